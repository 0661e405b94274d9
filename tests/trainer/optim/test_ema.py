"""Test the moving average of the weights: its value, and that it changes nothing else."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import StopAfter, last_checkpoint, losses, metrics, run
from torch import nn

from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.export.command import export_run
from hyperagent_trainer.optim.ema import WeightAverage
from hyperagent_trainer.runs.folder import RunFolder

DECAY = 0.4


def averaged(recipe: TrainRecipe) -> TrainRecipe:
    return recipe.model_copy(update={"ema_decay": DECAY, "checkpoint_every": 1, "keep_checkpoints": 50})


def test_it_is_the_sum_of_the_weights_of_all_steps_each_with_its_share(recipe: TrainRecipe, tmp_path: Path) -> None:
    folder = run(averaged(recipe), tmp_path / "run", StopAfter(6))
    plain = run(recipe.model_copy(update={"checkpoint_every": 1}), tmp_path / "plain", StopAfter(6))
    assert losses(folder) == losses(plain), "training continues with its own weights"
    steps = folder.saved_steps()
    assert steps == [1, 2, 3, 4, 5, 6]
    weights = [load_file(folder.checkpoint(step) / "network.safetensors") for step in steps]
    average = load_file(folder.checkpoint(6) / "average.safetensors")
    assert average
    decays = [min(DECAY, (1 + n) / (10 + n)) for n in steps]
    # The share of the initial weights, which follows from the first checkpoint.
    first = load_file(folder.checkpoint(1) / "average.safetensors")
    for name, found in average.items():
        start = (first[name].double().numpy() - (1 - decays[0]) * weights[0][name].double().numpy()) / decays[0]
        shares = [(1 - decay) * np.prod(decays[index + 1 :]) for index, decay in enumerate(decays)]
        assert sum(shares) + np.prod(decays) == pytest.approx(1)
        expected = np.prod(decays) * start + sum(
            s * w[name].double().numpy() for s, w in zip(shares, weights, strict=True)
        )
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-6 * max(1, np.abs(expected).max()))
    assert any(not torch.equal(average[name], weights[-1][name]) for name in average)


def test_a_stopped_run_resumes_with_the_same_average(recipe: TrainRecipe, tmp_path: Path) -> None:
    straight = run(averaged(recipe), tmp_path / "straight")
    run(averaged(recipe), tmp_path / "stopped", StopAfter(3))
    stopped = run(averaged(recipe), tmp_path / "stopped")
    assert losses(stopped) == losses(straight)
    for name in ("network.safetensors", "average.safetensors"):
        assert (last_checkpoint(stopped) / name).read_bytes() == (last_checkpoint(straight) / name).read_bytes()
    assert metrics(stopped)[-1]["held_out_kl"] == metrics(straight)[-1]["held_out_kl"]


def test_what_is_evaluated_and_exported_is_the_average(recipe: TrainRecipe, tmp_path: Path) -> None:
    recipe = averaged(recipe)
    root = tmp_path / "run"
    root.mkdir()
    RunFolder(root).recipe.write_text(recipe.model_dump_json())
    folder = run(recipe, root)
    plain = run(recipe.model_copy(update={"ema_decay": None}), tmp_path / "plain")
    assert metrics(folder)[-1]["held_out_kl"]["frozen"] == metrics(plain)[-1]["held_out_kl"]["frozen"]
    assert metrics(folder)[-1]["held_out_kl"]["adapter"] != metrics(plain)[-1]["held_out_kl"]["adapter"]
    average = load_file(last_checkpoint(folder) / "average.safetensors")
    bundle = load_file(folder.bundle / "hypernetwork.safetensors")
    assert all(torch.equal(bundle[name], average[name]) for name in average)
    assert "moving average of the weights with decay 0.4" in (folder.bundle / "README.md").read_text()
    export_run(folder, tmp_path / "out", None)
    assert (tmp_path / "out" / "hypernetwork.safetensors").read_bytes() == (
        folder.bundle / "hypernetwork.safetensors"
    ).read_bytes()


def test_without_a_decay_there_is_none(recipe: TrainRecipe, tmp_path: Path) -> None:
    folder = last_checkpoint(run(recipe, tmp_path / "run", StopAfter(2)))
    assert not (folder / "average.safetensors").exists()
    assert json.loads((folder / "checkpoint.json").read_text())["num_averaged"] == 0


def test_the_weights_come_back_also_after_an_error() -> None:
    network = nn.Linear(4, 4)
    average = WeightAverage(network, 0.9)
    with torch.no_grad():
        network.weight.mul_(3)
    average.update()
    own = network.weight.detach().clone()
    expected = average.tensors["weight"].clone()
    with suppress(ZeroDivisionError), average.in_use():
        assert torch.equal(network.weight, expected)
        raise ZeroDivisionError
    assert torch.equal(network.weight, own)
    assert torch.equal(average.tensors["weight"], expected)
