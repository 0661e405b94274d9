"""Tests of pause, resume and checkpoint with real training, on one and on several ranks."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tiny_runs import last_checkpoint, losses, run

from hyperagent.errors import Conflict
from hyperagent.http.run_models import FINAL_STATES, RunRequest
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.control.supervisor import Supervisor
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.store import Run

NEVER = 1_000_000


@pytest.fixture
def supervisor(recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """Return a supervisor with recipes "one" and "two": the same endless run on one and two ranks, no checkpoints."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    endless = {"num_steps": NEVER, "evaluate_every": NEVER, "checkpoint_every": NEVER, "learning_rate": 1e-5}
    for name, processes in (("one", 1), ("two", 2)):
        changed = recipe.model_copy(update={**endless, "processes": processes})
        # JSON is YAML.
        (recipes / f"{name}.yaml").write_text(changed.model_dump_json())
    supervisor = Supervisor(ControlSettings(recipes=recipes, runs=tmp_path / "runs", stop_grace_s=30.0))
    yield supervisor
    supervisor.close()


def wait_until(condition: Callable[[], bool], folder: RunFolder) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        status = folder.read_status()
        assert status.state not in ("failed", "done"), f"{status.reason}\n{folder.log.read_text()}"
        assert time.monotonic() < deadline, f"waited in vain, the run is {status.state}: {folder.log.read_text()}"
        time.sleep(0.02)


def wait_for_state(run: Run, *states: str) -> None:
    wait_until(lambda: run.folder.read_status().state in states, run.folder)


def wait_for_step(run: Run, step: int) -> None:
    wait_until(lambda: run.folder.metrics.exists() and max(losses(run.folder), default=0) >= step, run.folder)


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def saved_step(run: Run) -> int:
    step: int = json.loads((last_checkpoint(run.folder) / "checkpoint.json").read_text())["step"]
    return step


@pytest.mark.parametrize("name", ["one", pytest.param("two", marks=pytest.mark.slow)])
def test_a_run_is_saved_paused_resumed_and_stopped_while_it_waits(name: str, supervisor: Supervisor) -> None:
    run = supervisor.start(RunRequest(recipe=name))
    wait_for_step(run, 2)

    supervisor.checkpoint(run.run_id)
    wait_until(lambda: bool(run.folder.saved_steps()), run.folder)
    first_saved = saved_step(run)
    assert first_saved >= 2
    wait_for_step(run, first_saved + 2)
    assert saved_step(run) == first_saved, "one wish is one checkpoint"

    supervisor.pause(run.run_id)
    wait_for_state(run, "paused")
    paused = run.folder.read_status()
    assert (paused.step, paused.eta_s) == (saved_step(run), None)
    time.sleep(1)
    assert max(losses(run.folder)) == paused.step, "a paused run takes no step"
    waiting = supervisor.start(RunRequest(recipe=name))
    assert waiting.status.state == "queued", "a paused run keeps its place"
    supervisor.stop(waiting.run_id)

    supervisor.resume(run.run_id)
    wait_for_step(run, paused.step + 2)
    wait_for_state(run, "running")
    assert saved_step(run) == paused.step

    supervisor.pause(run.run_id)
    wait_for_state(run, "paused")
    supervisor.stop(run.run_id)
    wait_for_state(run, *FINAL_STATES)
    status = run.folder.read_status()
    assert (status.state, status.step) == ("stopped", saved_step(run))
    assert list(losses(run.folder)) == list(range(1, status.step + 1))


def test_a_pause_asked_for_while_the_student_loads_holds_before_the_first_step_and_not_after_a_resume(
    supervisor: Supervisor,
) -> None:
    run = supervisor.start(RunRequest(recipe="one"))
    supervisor.pause(run.run_id)
    supervisor.checkpoint(run.run_id)
    wait_for_state(run, "paused")
    assert (losses(run.folder), saved_step(run)) == ({}, 0)
    supervisor.stop(run.run_id)
    wait_for_state(run, "stopped")

    supervisor.resume(run.run_id)
    wait_for_step(run, 1)


def test_a_pause_that_is_taken_back_in_time_never_happens(supervisor: Supervisor) -> None:
    run = supervisor.start(RunRequest(recipe="one"))
    supervisor.pause(run.run_id)
    supervisor.resume(run.run_id)
    with pytest.raises(Conflict, match="cannot be resumed"):
        supervisor.resume(run.run_id)
    wait_for_step(run, 1)
    assert not run.folder.saved_steps()


def test_no_rank_outlives_a_torchrun_that_is_killed(supervisor: Supervisor) -> None:
    run = supervisor.start(RunRequest(recipe="two"))
    wait_for_step(run, 1)
    torchrun = psutil.Process(json.loads(run.folder.process.read_text())["pid"])
    ranks = torchrun.children(recursive=True)
    assert len(ranks) >= 2
    torchrun.kill()
    deadline = time.monotonic() + 30
    while run.folder.read_status().state != "failed" or any(is_running(rank) for rank in ranks):
        assert time.monotonic() < deadline, run.folder.read_status()
        time.sleep(0.05)


def test_a_damaged_wish_does_not_end_a_run(recipe: TrainRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "control.json").write_text("{")
    assert run(recipe, tmp_path / "run").read_status().state == "done"
