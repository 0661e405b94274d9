"""Tests of `hyperagent runs` with a real control endpoint and child processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import served
from typer.testing import CliRunner

from hyperagent.cli.main import build_app
from hyperagent.errors import NotFound
from hyperagent.http.run_client import RunClient
from hyperagent.http.run_models import RunOverrides, RunRequest
from hyperagent_trainer.control.app import create_control_app
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.control.supervisor import Supervisor

CHILD = (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "training_child.py"))
TOKEN = "a-token-for-tests-of-sufficient-length"


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HYPERAGENT_TOKEN", TOKEN)
    (tmp_path / "recipes").mkdir()
    for behavior in ("trains", "finishes"):
        (tmp_path / f"recipes/{behavior}.yaml").write_text(f"student: ../{behavior}\ntokens: t\ncache: c\n")
    settings = ControlSettings(recipes=tmp_path / "recipes", runs=tmp_path / "runs", stop_grace_s=5.0)
    with served(create_control_app(Supervisor(settings, command=CHILD), token=TOKEN)) as address:
        yield address


def invoke(address: str, *arguments: str) -> Any:
    return CliRunner().invoke(build_app(), ["runs", *arguments, "--server", address])


def test_runs_are_listed_shown_followed_and_stopped(address: str) -> None:
    assert invoke(address, "ls").stdout == ""
    with RunClient(address, TOKEN) as client:
        done = client.start(RunRequest(recipe="finishes", overrides=RunOverrides(num_steps=3)))
        assert invoke(address, "follow", done.id).exit_code == 0
        trains = client.start(RunRequest(recipe="trains"))
        assert json.loads(invoke(address, "pause", trains.id, "--json").stdout)["id"] == trains.id
        assert invoke(address, "resume", trains.id).exit_code == 0
        assert invoke(address, "stop", trains.id).exit_code == 0
        assert invoke(address, "follow", trains.id).exit_code == 1
    assert json.loads(invoke(address, "show", trains.id, "--json").stdout)["state"] == "stopped"
    lines = invoke(address, "ls").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[trains.id, "stopped"], [done.id, "done"]]
    assert all(len(line) <= 80 for line in lines)
    assert isinstance(invoke(address, "show", "20260101-000000-000000").exception, NotFound)
