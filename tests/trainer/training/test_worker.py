"""Tests of a training process that receives signals while it is loading."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_runs import metrics, start_worker

from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.runs.folder import RunFolder

NEVER = 1_000_000


def endless(recipe: TrainRecipe, *, processes: int = 1) -> TrainRecipe:
    changes = {"num_steps": NEVER, "evaluate_every": NEVER, "checkpoint_every": NEVER, "processes": processes}
    return recipe.model_copy(update=changes)


def wait_for_handler(process: subprocess.Popen[bytes]) -> None:
    """Wait until the interpreter has started and handles SIGTERM, which takes longer on a busy machine."""
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize(
    "delay_s", [0.3, *(pytest.param(delay_s, marks=pytest.mark.slow) for delay_s in (1.0, 2.0, 3.0))]
)
def test_a_worker_that_gets_sigterm_while_it_loads_ends_as_stopped(
    recipe: TrainRecipe, tmp_path: Path, delay_s: float
) -> None:
    started_at = time.monotonic()
    process, folder = start_worker(endless(recipe), tmp_path / "run"), RunFolder(tmp_path / "run")
    try:
        if sys.platform == "linux":
            wait_for_handler(process)
        time.sleep(max(0.0, started_at + delay_s - time.monotonic()))
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, folder.log.read_text()
    finally:
        process.kill()
    status = folder.read_status()
    assert status.state == "stopped"
    assert "on request" in status.reason
    assert status.step == max(folder.saved_steps(), default=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_answers_sigterm_before_it_imports_torch(recipe: TrainRecipe, tmp_path: Path) -> None:
    process = start_worker(recipe, tmp_path / "run")
    try:
        wait_for_handler(process)
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    finally:
        process.kill()
        process.wait()


def test_all_ranks_stop_while_loading_when_one_of_them_gets_sigterm(recipe: TrainRecipe, tmp_path: Path) -> None:
    process = start_worker(endless(recipe, processes=2), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    try:
        while not folder.status.exists():
            assert process.poll() is None, folder.log.read_text()
            time.sleep(0.01)
        ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
        ranks[0].send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, folder.log.read_text()
    finally:
        process.kill()
    status = folder.read_status()
    assert (status.state, status.step) == ("stopped", 0)
    assert not folder.metrics.exists() or not any("loss" in line for line in metrics(folder))
