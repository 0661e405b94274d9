"""Tests of the control endpoint with a real supervisor and real child processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from hyperagent.http.run_models import FINAL_STATES
from hyperagent_trainer.control.app import create_control_app
from hyperagent_trainer.control.cli import serve
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.control.supervisor import Supervisor

CHILD = (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "training_child.py"))
TOKEN = "secret"


@pytest.fixture
def settings(tmp_path: Path) -> ControlSettings:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for behavior in ("trains", "finishes"):
        (recipes / f"{behavior}.yaml").write_text(f"student: ../{behavior}\ntokens: t\ncache: c\n")
    return ControlSettings(recipes=recipes, runs=tmp_path / "runs", stop_grace_s=5.0)


@pytest.fixture
def client(settings: ControlSettings) -> Iterator[TestClient]:
    app = create_control_app(Supervisor(settings, command=CHILD), token=TOKEN)
    with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        yield client


def start(client: TestClient, recipe: str, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/runs", json={"recipe": recipe, **body})
    assert answer.status_code == 201, answer.text
    run: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == run["links"]["self"]
    return run


def wait_for_state(client: TestClient, run: dict[str, Any], *states: str) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while (run := client.get(run["links"]["self"]).json())["state"] not in states:
        assert time.monotonic() < deadline, f"waited in vain, the run is {run['state']}"
        time.sleep(0.02)
    return run


def test_a_run_is_started_watched_stopped_and_resumed(client: TestClient) -> None:
    run = wait_for_state(client, start(client, "trains", overrides={"num_steps": 500}), "running")
    assert (run["recipe"], run["num_steps"]) == ("trains", 500)
    assert set(run["links"]) == {"self", "metrics", "events", "stop", "pause", "checkpoint"}

    assert client.post(run["links"]["stop"]).status_code == 202
    run = wait_for_state(client, run, *FINAL_STATES)
    assert (run["state"], set(run["links"])) == ("stopped", {"self", "metrics", "events", "resume"})
    assert [listed["id"] for listed in client.get("/v1/runs").json()["runs"]] == [run["id"]]

    first = client.get(run["links"]["metrics"]).json()
    num_lines = len(first["metrics"])
    assert [line["step"] for line in first["metrics"]] == list(range(1, num_lines + 1))
    assert first["reset"] is False
    for since in (first["next"], num_lines):
        assert client.get(run["links"]["metrics"], params={"since": since}).json() == {**first, "metrics": []}
    # Places beyond the end or after different lines.
    for since in (num_lines + 1, f"{num_lines}-{'0' * 16}"):
        assert client.get(run["links"]["metrics"], params={"since": since}).json() == {**first, "reset": True}

    assert client.post(run["links"]["resume"]).status_code == 202
    wait_for_state(client, run, "running")
    waiting = start(client, "finishes")
    assert (waiting["state"], set(waiting["links"])) == ("queued", {"self", "metrics", "events", "stop"})
    conflict = client.post(f"{waiting['links']['self']}/pause")
    assert conflict.status_code == 409
    assert waiting["id"] in conflict.json()["detail"]
    assert client.post(waiting["links"]["stop"]).json()["state"] == "stopped"


def test_the_same_idempotency_key_answers_with_the_same_run(client: TestClient) -> None:
    answers = [
        client.post("/v1/runs", json={"recipe": recipe}, headers={"Idempotency-Key": "k"})
        for recipe in ("finishes", "finishes", "trains")
    ]
    assert [answer.status_code for answer in answers] == [201, 201, 409]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    assert len(client.get("/v1/runs").json()["runs"]) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"recipe": "finishes", "overrides": {"num_steps": 0}},
        {"recipe": "finishes", "overrides": {"batch_size": 100_000}},
        {"recipe": "finishes", "overrides": {"student": "/etc"}},
        {"recipe": "finishes", "overrides": {"seed": False}},
        {"recipe": "finishes", "overrides": {"num_steps": "7"}},
        {"recipe": "../recipes/finishes"},
        {"recipe": "finishes", "command": ["sh"]},
        {},
    ],
)
def test_a_wrong_body_is_refused_and_starts_nothing(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/v1/runs", json=body)
    assert answer.status_code in (400, 422)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert client.get("/v1/runs").json() == {"runs": []}


def test_what_is_not_there_is_404(client: TestClient) -> None:
    unknown = client.post("/v1/runs", json={"recipe": "tarins"})
    assert unknown.status_code == 404
    assert "finishes, trains" in unknown.json()["detail"]
    path = "/v1/runs/20260101-000000-000000"
    for answer in (
        client.get(path),
        client.get(f"{path}/metrics"),
        client.get(f"{path}/events"),
        client.post(f"{path}/stop"),
        client.post(f"{path}/resume"),
        client.post(f"{path}/pause"),
        client.post(f"{path}/checkpoint"),
    ):
        assert answer.status_code == 404


def test_recipes_are_listed(client: TestClient) -> None:
    assert client.get("/v1/recipes").json() == {"recipes": ["finishes", "trains"]}


@pytest.mark.parametrize("since", ["-1", "", "1-", "1-xyz", "9" * 11, "\u0661", "1\n"])
def test_metrics_take_no_place_that_is_none(client: TestClient, since: str) -> None:
    run = start(client, "finishes")
    assert client.get(run["links"]["metrics"], params={"since": since}).status_code in (400, 422)


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/runs"), ("POST", "/v1/runs"), ("GET", "/v1/recipes")])
@pytest.mark.parametrize("header", ["", "Bearer wrong"])
def test_without_the_token_nothing_is_answered(client: TestClient, method: str, path: str, header: str) -> None:
    answer = client.request(method, path, headers={"Authorization": header}, json={"recipe": "finishes"})
    assert answer.status_code == 401
    assert client.get("/v1/runs").json() == {"runs": []}


def test_shutting_down_stops_the_training_process(settings: ControlSettings) -> None:
    app = create_control_app(Supervisor(settings, command=CHILD), token=TOKEN)
    with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        run = wait_for_state(client, start(client, "trains"), "running")
        process = psutil.Process(json.loads((Path(run["folder"]) / "process.json").read_text())["pid"])
    assert not process.is_running()
    assert json.loads((Path(run["folder"]) / "status.json").read_text())["state"] == "stopped"


def test_the_command_documents_every_option_and_needs_no_torch_for_it() -> None:
    command = typer.Typer(add_completion=False)
    command.command()(serve)
    text = CliRunner().invoke(command, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}, terminal_width=200).output
    for name in ("RECIPES", "RUNS", "HOST", "PORT", "ALLOW_REMOTE", "STOP_GRACE_S"):
        assert f"HYPERAGENT_TRAINER_{name}" in text
    lean = "import sys, hyperagent_trainer.cli; sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", lean], check=False).returncode == 0
