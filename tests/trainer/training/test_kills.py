"""Test that a training process killed repeatedly at random moments produces the same run as an uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tiny_runs import last_checkpoint, losses, metrics, run

from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.training.trainer import train

MANY_KILLS = int(os.environ.get("HYPERAGENT_TEST_KILLS", "20"))


def _life(recipe: TrainRecipe, root: Path) -> None:
    train(recipe, RunFolder(root), threading.Event())


def _wait_for_progress(folder: RunFolder, life: BaseProcess, draw: random.Random) -> None:
    """Wait until a random point of startup, or until a few steps and a part of another are done."""
    num_steps = draw.randrange(4)
    if num_steps == 0:
        life.join(draw.uniform(0, 1))
        return
    size = folder.metrics.stat().st_size if folder.metrics.exists() else 0
    for _ in range(num_steps):
        while life.is_alive() and (not folder.metrics.exists() or folder.metrics.stat().st_size <= size):
            time.sleep(0.001)
        size = folder.metrics.stat().st_size
    life.join(draw.uniform(0, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [3, MANY_KILLS])
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_at_random_moments_is_the_run_that_was_not(
    num_kills: int, recipe: TrainRecipe, tmp_path: Path
) -> None:
    # More steps than the killed processes can finish, so that none of them reaches the end.
    num_steps = 4 * num_kills + 40
    # A checkpoint after every step, so that many kills occur while one is being written.
    recipe = recipe.model_copy(
        update={"num_steps": num_steps, "evaluate_every": num_steps, "checkpoint_every": 1, "learning_rate": 1e-3}
    )
    undisturbed = run(recipe, tmp_path / "undisturbed")

    root = tmp_path / "killed"
    root.mkdir()
    folder = RunFolder(root)
    draw = random.Random(0)
    # A process forked from one that has imported everything starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hyperagent_trainer.training.trainer", "transformers"])
    for _ in range(num_kills):
        life = context.Process(target=_life, args=(recipe, root))
        life.start()
        _wait_for_progress(folder, life, draw)
        assert life.is_alive(), f"it ended by itself with {life.exitcode}"
        life.kill()
        life.join()
    train(recipe, folder, threading.Event())

    assert losses(folder) == losses(undisturbed)
    assert [line["step"] for line in metrics(folder) if "loss" in line] == list(range(1, num_steps + 1))
    assert metrics(folder)[-1]["held_out_kl"] == metrics(undisturbed)[-1]["held_out_kl"]
    for name in ("network.safetensors", "optimizer.safetensors"):
        assert (last_checkpoint(folder) / name).read_bytes() == (last_checkpoint(undisturbed) / name).read_bytes()
    assert folder.read_status().state == "done"
