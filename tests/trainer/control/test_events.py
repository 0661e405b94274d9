"""Tests of a run's events: in order, once each, resumable, and without leaks."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hyperagent.http.run_models import RunRequest, RunState, RunStatus
from hyperagent.storage.files import write_atomically
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.control import events
from hyperagent_trainer.control.app import create_control_app
from hyperagent_trainer.control.events import run_events
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.control.supervisor import Supervisor
from hyperagent_trainer.runs.metrics_file import START, Place
from hyperagent_trainer.runs.store import Run, Runs, new_run_id

Event = tuple[str, str | None, dict[str, Any]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_POLL_S", 0.01)
    monkeypatch.setattr(events, "_LINES_AT_ONCE", 10)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    (tmp_path / "runs").mkdir()
    return Runs(tmp_path / "runs")


@pytest.fixture
def run(runs: Runs) -> Run:
    recipe = TrainRecipe(student=Path("s"), tokens=Path("t"), cache=Path("c"))
    return runs.create(new_run_id(), RunRequest(recipe="r"), recipe, idempotency_key=None)


def say(run: Run, state: RunState, step: int = 0) -> None:
    run.folder.write_status(RunStatus(state=state, step=step, num_steps=100))


def add_lines(run: Run, first: int, last: int) -> None:
    with run.folder.metrics.open("a") as file:
        file.writelines(json.dumps({"step": step}) + "\n" for step in range(first, last + 1))


def number(place: str | None) -> int | None:
    return None if place is None else Place.parse(place).num_lines


def parse(text: str) -> list[Event]:
    """Parse events as the standard specifies: blocks of `field: value` lines, each ended by an empty line."""
    assert text.endswith("\n\n")
    found: list[Event] = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


async def everything(stream: AsyncIterator[str]) -> list[Event]:
    return [event async for part in stream for event in parse(part)]


def test_an_ended_run_is_told_whole_and_from_any_line(runs: Runs, run: Run) -> None:
    add_lines(run, 1, 25)
    say(run, "done", 25)
    received = asyncio.run(everything(run_events(runs, run.run_id, since=START)))
    assert [(name, number(place), data["step"]) for name, place, data in received] == [
        *(("metrics", step, step) for step in range(1, 26)),
        ("status", None, 25),
    ]
    for count in (1, 10, 24, 25):
        for since in (Place(count), Place.parse(received[count - 1][1] or "")):
            assert asyncio.run(everything(run_events(runs, run.run_id, since=since))) == received[count:]


def test_a_place_that_is_no_more_begins_anew_and_says_so(runs: Runs, run: Run) -> None:
    add_lines(run, 1, 25)
    say(run, "done", 25)
    received = asyncio.run(everything(run_events(runs, run.run_id, since=START)))
    for since in (Place(26), Place.parse(f"20-{'0' * 16}"), Place.parse((received[19][1] or "").replace("20-", "19-"))):
        assert asyncio.run(everything(run_events(runs, run.run_id, since=since))) == [("reset", None, {}), *received]


def test_lines_that_are_cut_while_somebody_listens_are_taken_back(runs: Runs, run: Run) -> None:
    async def watch() -> list[Event]:
        stream = run_events(runs, run.run_id, since=START)
        received = parse(await anext(stream))
        # The next process removes the lines after its checkpoint and writes the same number of new lines.
        kept = "".join(run.folder.metrics.read_text().splitlines(keepends=True)[:3])
        others = "".join(json.dumps({"step": step, "again": True}) + "\n" for step in range(4, 7))
        write_atomically(run.folder.metrics, (kept + others).encode())
        say(run, "stopped", 6)
        return received + await everything(stream)

    add_lines(run, 1, 6)
    say(run, "running", 6)
    received = asyncio.run(watch())
    assert [name for name, _, _ in received] == [*["metrics"] * 6, "status", "reset", *["metrics"] * 6, "status"]
    assert [data for name, _, data in received if name == "metrics"][6:] == [
        *({"step": step} for step in range(1, 4)),
        *({"step": step, "again": True} for step in range(4, 7)),
    ]


def test_what_happens_is_told_as_it_happens_and_once(runs: Runs, run: Run) -> None:
    async def watch() -> list[Event]:
        stream = run_events(runs, run.run_id, since=START)
        received = parse(await anext(stream))
        say(run, "running")
        received += parse(await anext(stream))
        add_lines(run, 1, 3)
        received += parse(await anext(stream))
        add_lines(run, 4, 12)
        say(run, "stopped", 12)
        return received + await everything(stream)

    received = asyncio.run(watch())
    assert [data["state"] for name, _, data in received if name == "status"] == ["queued", "running", "stopped"]
    assert [number(place) for name, place, _ in received if name == "metrics"] == list(range(1, 13))
    assert received[-1][0] == "status", "the final status comes after every line"


def test_a_silent_run_is_kept_open_by_comments(runs: Runs, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_HEARTBEAT_S", 0.05)

    async def watch() -> list[str]:
        stream = run_events(runs, run.run_id, since=START)
        return [await anext(stream) for _ in range(3)]

    first, *beats = asyncio.run(watch())
    assert parse(first)[0][0] == "status"
    assert all(beat.startswith(":") and parse(beat) == [] for beat in beats)


def test_a_service_that_stops_ends_its_streams(runs: Runs, run: Run) -> None:
    say(run, "running")
    closing = threading.Event()

    async def watch() -> list[Event]:
        stream = run_events(runs, run.run_id, since=START, is_closing=closing.is_set)
        received = parse(await anext(stream))
        closing.set()
        return received + await asyncio.wait_for(everything(stream), 10)

    assert [name for name, _, _ in asyncio.run(watch())] == ["status"]


def test_what_is_not_finite_is_sent_as_null(runs: Runs, run: Run) -> None:
    run.folder.metrics.write_text('{"step": 1, "loss": NaN, "norms": {"a": -Infinity, "b": 1e999, "c": 0.5}}\n')
    say(run, "done", 1)
    received = asyncio.run(everything(run_events(runs, run.run_id, since=START)))
    assert received[0][2] == {"step": 1, "loss": None, "norms": {"a": None, "b": None, "c": 0.5}}


def test_what_cannot_be_read_ends_the_stream_with_a_problem(runs: Runs, run: Run) -> None:
    run.folder.metrics.write_text("not json\n")
    received = asyncio.run(everything(run_events(runs, run.run_id, since=START)))
    assert [name for name, _, _ in received] == ["problem"]
    assert "line 1 is not JSON" in received[0][2]["detail"]


def test_over_http_the_header_resumes_and_a_caller_that_goes_leaves_nothing(tmp_path: Path, runs: Runs) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    supervisor = Supervisor(ControlSettings(recipes=recipes, runs=runs.root))
    recipe = TrainRecipe(student=Path("s"), tokens=Path("t"), cache=Path("c"))
    run = runs.create(new_run_id(), RunRequest(recipe="r"), recipe, idempotency_key=None)
    add_lines(run, 1, 12)
    app = create_control_app(supervisor, token="secret")
    with TestClient(app, headers={"Authorization": "Bearer secret"}) as client:
        say(run, "done", 12)
        path = f"/v1/runs/{run.run_id}/events"
        answer = client.get(path, headers={"Last-Event-ID": "10"})
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        received = parse(answer.text)
        assert [number(place) for _, place, _ in received] == [11, 12, None]
        assert parse(client.get(path, headers={"Last-Event-ID": received[0][1] or ""}).text) == received[1:]
        for wrong in ("-1", "x", "1-", "1-xyz", "9" * 11, "1\u0660"):
            assert client.get(path, headers={"Last-Event-ID": wrong.encode()}).status_code == 422, wrong
        assert client.get(path, headers={"Authorization": ""}).status_code == 401

        say(run, "running", 12)
        assert asyncio.run(_leave_after_first_part(app, path)) == []


async def _leave_after_first_part(app: Any, path: str) -> list[str]:
    """Send a request like a server, disconnect after the first part, and return the names of remaining tasks."""
    came = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not asked:
            asked.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await came.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            came.set()

    asked: list[bool] = []
    headers = [(b"host", b"localhost"), (b"authorization", b"Bearer secret")]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "state": {},
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), timeout=20)
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    return left + [thread.name for thread in threading.enumerate() if "watch" in thread.name]
