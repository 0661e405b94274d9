"""Tests that training is the same on one, two and four ranks, sharded or not, with or without recomputation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import failing_rank
import psutil
import pytest
import ranks_child
import torch
from safetensors.torch import load_file
from tiny_runs import last_checkpoint, losses, metrics, run
from torch import Tensor

from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.runs.folder import RunFolder

Found = dict[str, tuple[list[float], dict[str, Tensor]]]


def torchrun(num_ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]


def run_on(num_ranks: int, recipe: TrainRecipe, folder: Path) -> Found:
    """Return the results of `ranks_child` on `num_ranks` ranks, by variant."""
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    subprocess.run(
        [*torchrun(num_ranks), ranks_child.__file__, folder / "recipe.json", folder],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return {
        way: (json.loads((folder / f"{way}.json").read_text()), load_file(folder / f"{way}.safetensors"))
        for way in [*ranks_child.WAYS, *([ranks_child.EXACT] if num_ranks == 1 else [])]
    }


@pytest.fixture(scope="module")
def recipe_of_three(student_folder: Path, tokens_file: Path, cache_folder: Path) -> TrainRecipe:
    """Return a recipe with steps of three trajectories, which two or four ranks cannot share evenly.

    The learning rate is small because AdamW's first steps have the same size for any gradient, even for rounding noise.
    """
    shape = {"width": 32, "num_latents": 4, "encoder_blocks": 1, "generator_blocks": 1, "num_heads": 2, "rank": 2}
    return TrainRecipe(
        student=student_folder, tokens=tokens_file, cache=cache_folder, hypernetwork=shape, max_prompt_tokens=64,
        batch_size=3, learning_rate=1e-5, warmup_steps=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found_alone(recipe_of_three: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_on(1, recipe_of_three, tmp_path_factory.mktemp("ranks") / "1")


@pytest.fixture
def alone(found_alone: Found) -> Found:
    """Return the results of one rank in every way that is to change nothing."""
    return {way: found_alone[way] for way in ranks_child.WAYS}


@pytest.fixture
def bound(found_alone: Found) -> float:
    """Return float32's own error on this CPU: the largest difference that its rounding explains."""
    error = largest_difference(found_alone[ranks_child.EXACT][1], found_alone["replicated"][1])
    # Rounding explains 3e-5 to 1.4e-4, by initialization and CPU; a missing sample changes it by tens of percent.
    assert error < 1e-3, "the gradient is not that of float64"
    return error


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference of any gradient, relative to the largest gradient."""
    scale = max(float(g.abs().max()) for g in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale


def test_recomputation_changes_nothing(alone: Found, bound: float) -> None:
    losses, gradients = alone["replicated"]
    assert all(g.any() for g in gradients.values())
    for found_losses, found_gradients in alone.values():
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert found_gradients.keys() == gradients.keys()
        assert largest_difference(gradients, found_gradients) < bound


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_trains_the_same(
    num_ranks: int, recipe_of_three: TrainRecipe, alone: Found, bound: float, tmp_path: Path
) -> None:
    losses, gradients = alone["replicated"]
    for found_losses, found_gradients in run_on(num_ranks, recipe_of_three, tmp_path / "ranks").values():
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert found_gradients.keys() == gradients.keys()
        assert largest_difference(gradients, found_gradients) < bound


def train_on(num_ranks: int, folder: RunFolder) -> subprocess.Popen[bytes]:
    """Run the training process of a run's folder under torchrun."""
    return subprocess.Popen(
        [*torchrun(num_ranks), "-m", "hyperagent_trainer.worker", str(folder.root)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


@pytest.mark.parametrize("shard_network", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_goes_on_on_another_number_of_ranks(
    shard_network: bool, recipe_of_three: TrainRecipe, tmp_path: Path
) -> None:
    recipe = recipe_of_three.model_copy(
        update={
            "num_steps": 6,
            "checkpoint_every": 3,
            "evaluate_every": 2,
            "shard_network": shard_network,
            "ema_decay": 0.9,
        }
    )
    undisturbed = run(recipe, tmp_path / "undisturbed")
    folder = RunFolder(tmp_path / "moved")
    folder.root.mkdir()
    folder.recipe.write_text(recipe.model_dump_json())

    process = train_on(2, folder)
    while process.poll() is None and not folder.saved_steps():
        time.sleep(0.05)
    # torchrun gives every rank its own session and ends the others when one dies.
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.kill()
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    done = len(losses(folder))
    assert 3 <= done < 6
    assert train_on(3, folder).wait() == 0

    assert folder.read_status().state == "done"
    assert losses(folder) == pytest.approx(losses(undisturbed), rel=1e-6)
    held_out = [metrics(f)[-1]["held_out_kl"] for f in (folder, undisturbed)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    bundles = [load_file(f.bundle / "hypernetwork.safetensors") for f in (folder, undisturbed)]
    assert torch.equal(*(bundle.pop("common_V") for bundle in bundles))
    assert bundles[0].keys() == bundles[1].keys()
    assert largest_difference(*bundles) < 1e-4


def test_a_rank_that_dies_ends_the_run_and_the_checkpoint_stands(recipe_of_three: TrainRecipe, tmp_path: Path) -> None:
    recipe = recipe_of_three.model_copy(update={"num_steps": 10_000, "checkpoint_every": 1, "evaluate_every": 10_000})
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.recipe.write_text(recipe.model_dump_json())
    process = train_on(2, folder)
    while process.poll() is None and not folder.saved_steps():
        time.sleep(0.05)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "worker" in " ".join(p.cmdline())]
    workers[-1].kill()

    assert process.wait(60) != 0
    status = folder.read_status()
    assert status.state == "failed"
    assert "rank 0: another rank ended without a word; it crashed, or was killed" in status.reason
    assert (folder.errors / "rank-0.txt").read_text().startswith("Traceback")
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)
    assert json.loads((last_checkpoint(folder) / "checkpoint.json").read_text())["step"] >= 1


def test_a_rank_that_fails_gives_the_run_its_reason_and_holds_nobody_up(
    recipe_of_three: TrainRecipe, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.recipe.write_text(recipe_of_three.model_copy(update={"num_steps": 50}).model_dump_json())
    process = subprocess.Popen(
        [*torchrun(2), failing_rank.__file__, str(folder.root)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert process.wait(120) != 0
    status = folder.read_status()
    assert (status.state, status.reason) == ("failed", "rank 1: ValueError: the second batch is bad")
    assert "fail_in_the_second_step" in (folder.errors / "rank-1.txt").read_text()


def test_sigterm_to_torchrun_saves_and_ends_as_stopped(recipe_of_three: TrainRecipe, tmp_path: Path) -> None:
    recipe = recipe_of_three.model_copy(
        update={"num_steps": 10_000, "checkpoint_every": 10_000, "evaluate_every": 10_000}
    )
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.recipe.write_text(recipe.model_dump_json())
    process = train_on(2, folder)
    while process.poll() is None and len(losses(folder) if folder.metrics.exists() else {}) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(60)

    status = folder.read_status()
    assert status.state == "stopped"
    assert json.loads((last_checkpoint(folder) / "checkpoint.json").read_text())["step"] == status.step >= 2
