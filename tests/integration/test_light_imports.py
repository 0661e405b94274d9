"""Tests that fast commands and modules load no deep learning library, each in a fresh interpreter.

import-linter reads import statements; these tests check the modules that were actually imported, by whatever means.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "triton", "vllm")
MODULES = [
    "hyperagent.cli.main", "hyperagent.http.adapter_client", "hyperagent.http.app", "hyperagent.http.run_client",
    "hyperagent.http.server", "hyperagent.settings", "hyperagent.wire.client",
    "hyperagent_adapter_api.cli", "hyperagent_teacher.cli",
    "hyperagent_trainer.cli", "hyperagent_trainer.config", "hyperagent_trainer.control.app",
    "hyperagent_trainer.control.cli", "hyperagent_trainer.control.supervisor", "hyperagent_trainer.runs.commands",
    "hyperagent_trainer.runs.metrics_file", "hyperagent_trainer.runs.store", "hyperagent_trainer.worker",
]  # fmt: skip
COMMANDS = {
    "--help": 0, "cache --help": 0, "cache ls nowhere": 1, "data --help": 0, "serve --help": 0,
    "serve teacher --help": 0, "serve trainer --help": 0, "serve adapter-api --help": 0,
    "train demo --server http://127.0.0.1:9": 1, "wait trainer --address http://127.0.0.1:9 --timeout 0.1": 1,
    "wait teacher --address 127.0.0.1:9 --timeout 0.1": 1, "adapter create --help": 0, "export --help": 0,
    "preflight --help": 0, "plan --help": 0, "demo --help": 0,
}  # fmt: skip
REPORT = f"""
import sys
def report():
    print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
RUN_COMMAND = """
import atexit
atexit.register(report)
from hyperagent.cli.main import main
main()
"""


def run(code: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HYPERAGENT_")}
    return subprocess.run(
        [sys.executable, "-c", REPORT + code, *arguments],
        env={**kept, "HYPERAGENT_TOKEN": "secret"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def loaded(done: subprocess.CompletedProcess[str]) -> list[str]:
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("loaded:")]
    return line.split()[1:]


def test_the_light_modules_load_no_deep_learning_library(tmp_path: Path) -> None:
    imports = "".join(f"import {module}\nif {HEAVY[0]!r} in sys.modules: sys.exit({module!r})\n" for module in MODULES)
    done = run(f"{imports}report()", tmp_path)
    assert done.returncode == 0, done.stderr  # The last line contains the first module that loads torch.
    assert loaded(done) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_light_command_loads_no_deep_learning_library(command: str, tmp_path: Path) -> None:
    done = run(RUN_COMMAND, tmp_path, *command.split())
    assert done.returncode == COMMANDS[command], done.stderr
    assert loaded(done) == []


def test_a_module_that_does_load_torch_is_noticed(tmp_path: Path) -> None:
    assert "torch" in loaded(run("import hyperagent.model.bundle\nreport()", tmp_path))
