"""Test of the control endpoint against its OpenAPI document with Schemathesis (https://schemathesis.readthedocs.io)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from served import served

from hyperagent_trainer.control.app import create_control_app
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.control.supervisor import Supervisor

CHILD = (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "training_child.py"))
TOKEN = "secret"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_check_of_schemathesis_passes_on_every_operation(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    # Recipes have the shortest possible names, so that runs are really started. Their runs are short, because a
    # request for a run's events lasts until the run's end.
    for name, behavior in (("0", "trains"), ("1", "finishes"), ("a", "crashes"), ("A", "killed")):
        (recipes / f"{name}.yaml").write_text(f"student: ../{behavior}\ntokens: t\ncache: c\nnum_steps: 20\n")
    settings = ControlSettings(recipes=recipes, runs=tmp_path / "runs", stop_grace_s=1.0)
    supervisor = Supervisor(settings, command=CHILD)
    with served(create_control_app(supervisor, token=TOKEN)) as address:
        command = f"run {address}/openapi.json --checks all --seed 1 --max-examples 50 --request-timeout 30 --no-color"
        found = subprocess.run(
            [Path(sys.executable).with_name("st"), *command.split(), "--header", f"Authorization: Bearer {TOKEN}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        started = supervisor.runs.all()
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Tested: 14" in found.stdout
    assert {"0"} <= {run.request.recipe for run in started}
