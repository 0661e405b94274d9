"""One rank, two and four, the network whole or sharded, activations kept or recomputed: the same training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_child
from safetensors.torch import load_file
from torch import Tensor

from hyperagent_trainer.config import TrainRecipe

Found = dict[str, tuple[list[float], dict[str, Tensor]]]


def run_on(num_ranks: int, recipe: TrainRecipe, folder: Path) -> Found:
    """What `ranks_child` finds on so many ranks, by way."""
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    subprocess.run(
        [*command, ranks_child.__file__, folder / "recipe.json", folder],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return {
        way: (json.loads((folder / f"{way}.json").read_text()), load_file(folder / f"{way}.safetensors"))
        for way in ranks_child.WAYS
    }


@pytest.fixture(scope="module")
def recipe_of_three(student_folder: Path, tokens_file: Path, cache_folder: Path) -> TrainRecipe:
    """Steps of three trajectories, which neither two ranks nor four can share evenly.

    The rate is small, since AdamW's first steps are of one size whatever the gradient's, also where it is rounding alone.
    """
    shape = {"width": 32, "num_latents": 4, "encoder_blocks": 1, "generator_blocks": 1, "num_heads": 2, "rank": 2}
    return TrainRecipe(
        student=student_folder, tokens=tokens_file, cache=cache_folder, hypernetwork=shape, max_prompt_tokens=64,
        batch_size=3, learning_rate=1e-5, warmup_steps=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(recipe_of_three: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_on(1, recipe_of_three, tmp_path_factory.mktemp("ranks") / "1")


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of any gradient, relative to the largest of all."""
    scale = max(float(g.abs().max()) for g in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale


def test_recomputation_changes_nothing(alone: Found) -> None:
    losses, gradients = alone["replicated"]
    assert all(g.any() for g in gradients.values())
    for found_losses, found_gradients in alone.values():
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert found_gradients.keys() == gradients.keys()
        assert largest_difference(gradients, found_gradients) < 1e-6


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_number_of_ranks_trains_the_same(
    num_ranks: int, recipe_of_three: TrainRecipe, alone: Found, tmp_path: Path
) -> None:
    losses, gradients = alone["replicated"]
    for found_losses, found_gradients in run_on(num_ranks, recipe_of_three, tmp_path / "ranks").values():
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert found_gradients.keys() == gradients.keys()
        assert largest_difference(gradients, found_gradients) < 1e-6
