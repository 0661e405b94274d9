"""Tests of `hyperagent doctor` and of general properties of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from world import Run, World

from hyperagent import __version__


def test_doctor_finds_this_machine_ready(run: Run, world: World) -> None:
    done = run("doctor", "--tokenizer", world.tokenizer, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["healthy"]
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["python"] == states["torch"] == states["tokenizer"] == "ok"


def test_doctor_names_what_must_be_mended(run: Run, tmp_path: Path, environment: dict[str, str]) -> None:
    environment["HYPERAGENT_REDIS_URL"] = "redis://127.0.0.1:1/0"
    done = run("doctor", "--tokenizer", tmp_path, "--json")
    assert done.returncode == 1
    failed = {check["name"]: check for check in json.loads(done.stdout)["checks"] if check["state"] == "fail"}
    assert set(failed) == {"redis", "tokenizer"}
    assert all(check["fix"] for check in failed.values())


COMMANDS = [
    ["demo"],
    ["serve", "teacher"],
    ["serve", "trainer"],
    ["serve", "adapter-api"],
    ["cache", "populate"],
    ["cache", "verify"],
    ["cache", "stats"],
    *(
        ["cache", command]
        for command in ("audit", "ls", "plan", "repair", "gc", "compact", "export", "import", "publish")
    ),
    ["data", "tokenize"],
    ["train"],
    ["adapter", "create"],
    ["wait"],
    ["doctor"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str], run: Run) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout.strip() == __version__
