"""Tests of the trainer's clients with a real control endpoint, port and child processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import served

from hyperagent.errors import ConfigError, Conflict, NotFound
from hyperagent.http.run_client import AsyncRunClient, RunClient
from hyperagent.http.run_models import RunOverrides, RunRequest
from hyperagent_trainer.control.app import create_control_app
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.control.supervisor import Supervisor

CHILD = (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "training_child.py"))
TOKEN = "secret"
FINISHES = RunRequest(recipe="finishes", overrides=RunOverrides(num_steps=3))


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for behavior in ("trains", "finishes"):
        (recipes / f"{behavior}.yaml").write_text(f"student: ../{behavior}\ntokens: t\ncache: c\n")
    settings = ControlSettings(recipes=recipes, runs=tmp_path / "runs", stop_grace_s=5.0)
    with served(create_control_app(Supervisor(settings, command=CHILD), token=TOKEN)) as address:
        yield address


def test_a_run_is_followed_to_its_end(address: str) -> None:
    with RunClient(address, TOKEN) as client:
        assert client.recipes() == ["finishes", "trains"]
        started = client.start(FINISHES, idempotency_key="once")
        assert client.start(FINISHES, idempotency_key="once").id == started.id
        seen = list(client.follow(started.id, poll_s=0.02))
        assert {run.id for run in seen} == {started.id}
        assert (seen[-1].state, seen[-1].num_steps) == ("done", 3)
        assert all(run.state not in ("done", "failed", "stopped") for run in seen[:-1])
        assert [(run.id, run.state) for run in client.runs()] == [(started.id, client.get(started.id).state)]


def test_metrics_are_read_from_where_the_last_answer_ended(address: str) -> None:
    with RunClient(address, TOKEN) as client:
        *_, run = client.follow(client.start(FINISHES).id, poll_s=0.02)
        with (Path(run.folder) / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1}\n')
            file.flush()
            first = client.metrics(run.id)
            file.write('{"step": 2}\n')
            file.flush()
            rest = client.metrics(run.id, since=first.next)
    assert (first.metrics, rest.metrics, rest.reset) == ([{"step": 1}], [{"step": 2}], False)


def test_a_run_is_paused_resumed_saved_and_stopped(address: str) -> None:
    with RunClient(address, TOKEN) as client:
        run = client.start(RunRequest(recipe="trains"))
        for seen in client.follow(run.id, poll_s=0.02):
            if seen.state == "running":
                break
        assert client.checkpoint(run.id).id == client.pause(run.id).id == client.resume(run.id).id == run.id
        client.stop(run.id)
        *_, ended = client.follow(run.id, poll_s=0.02)
        assert ended.state == "stopped"
        with pytest.raises(Conflict, match="nothing to stop"):
            client.stop(run.id)


def test_what_the_service_refuses_is_raised_as_the_error_it_met(address: str) -> None:
    with RunClient(address, TOKEN) as client:
        with pytest.raises(NotFound, match="no recipe 'tarins'; there are: finishes, trains"):
            client.start(RunRequest(recipe="tarins"))
        with pytest.raises(NotFound, match="no run"):
            next(client.follow("20260101-000000-000000"))
    with RunClient(address, "wrong") as client, pytest.raises(ConfigError, match="HYPERAGENT_TOKEN"):
        client.runs()


async def test_the_asynchronous_client_asks_the_same(address: str) -> None:
    async with AsyncRunClient(address, TOKEN) as client:
        await client.wait_until_ready(20)
        assert await client.recipes() == ["finishes", "trains"]
        started = await client.start(FINISHES, idempotency_key="once")
        *_, ended = [run async for run in client.follow(started.id, poll_s=0.02)]
        assert ended.state == "done"
        assert [run.id for run in await client.runs()] == [(await client.get(started.id)).id]
        (Path(ended.folder) / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        assert (await client.metrics(started.id, since="1")).metrics == [{"step": 2}]
        for command in (client.stop, client.pause, client.checkpoint, client.resume):
            with pytest.raises(Conflict, match=started.id):
                await command(started.id)
