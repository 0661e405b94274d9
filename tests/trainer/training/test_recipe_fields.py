"""Tests that every field of a recipe affects the step: real runs against a step written by hand."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from plain_step import PlainStep, PlainStudent, SavedRun, plain_step, relative_error, saved_run, uneven_prompts
from tiny_runs import losses, metrics, run
from torch import Tensor

from hyperagent.data.files.tokens_file import TRAIN, TokenizedTrajectory, read_tokens
from hyperagent.model.peft_io import read_adapter
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.loss.options import LossOptions

NOISE = 5e-6
"""Tolerance of a loss in float32 relative to float64; measured: up to 5e-7."""
GRADIENT_NOISE = 1e-4
"""Tolerance of a gradient; measured: up to 2.4e-5. Ignoring a field changes the gradient by 1 % or more."""


@pytest.fixture(scope="module")
def whole_split(recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> TrainRecipe:
    """Return a recipe with steps over all eight trajectories, so that order is irrelevant, and unequal prompts."""
    tokens = uneven_prompts(recipe.tokens, tmp_path_factory.mktemp("uneven") / "tokens.parquet")
    return recipe.model_copy(update={"tokens": tokens, "batch_size": 8, "num_steps": 1, "evaluate_every": 100})


@pytest.fixture(scope="module")
def trajectories(whole_split: TrainRecipe) -> list[TokenizedTrajectory]:
    return list(read_tokens(whole_split.tokens, split=TRAIN))


@pytest.fixture(scope="module")
def unusual(whole_split: TrainRecipe) -> TrainRecipe:
    """Return a recipe in which every field of the step differs from its default."""
    changes = {
        "temperature": 2.0,
        "loss": LossOptions(divergence="jsd", jsd_beta=0.3, ce_weight=0.25),
        "num_steps": 7,
        "warmup_steps": 2,
        "learning_rate": 1.5e-3,
        "b_head_learning_rate_factor": 4.0,
        "weight_decay": 0.3,
        # Small enough for AdamW's epsilon to matter; otherwise the first step would not depend on the gradient's size.
        "max_grad_norm": 1e-6,
        "micro_batch_size": 3,
    }
    return whole_split.model_copy(update=changes)


@pytest.fixture(scope="module")
def done(unusual: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return saved_run(unusual, tmp_path_factory.mktemp("unusual") / "run")


@pytest.fixture(scope="module")
def expected(unusual: TrainRecipe, done: SavedRun, trajectories: list[TokenizedTrajectory]) -> PlainStep:
    return plain_step(unusual, done.weights(0), trajectories)


@pytest.fixture(scope="module")
def two_steps(whole_split: TrainRecipe) -> TrainRecipe:
    return whole_split.model_copy(update={"num_steps": 2, "max_grad_norm": 1e3})


@pytest.fixture(scope="module")
def plain(two_steps: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    """Return a recipe with forward KL, without clipping, and one trajectory at a time."""
    return saved_run(two_steps, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def plain_gradient(
    two_steps: TrainRecipe, plain: SavedRun, trajectories: list[TokenizedTrajectory]
) -> dict[str, Tensor]:
    return plain_step(two_steps, plain.weights(0), trajectories).gradient


def first_line(done: SavedRun) -> dict[str, float]:
    line: dict[str, float] = next(line for line in metrics(done.folder) if line.get("step") == 1 and "loss" in line)
    return line


def test_temperature_and_loss_options_reach_the_logged_loss(done: SavedRun, expected: PlainStep) -> None:
    assert first_line(done)["loss"] == pytest.approx(expected.loss, rel=NOISE)


def test_the_logged_norm_is_that_before_clipping(done: SavedRun, expected: PlainStep) -> None:
    assert expected.norm > 1e-3
    assert first_line(done)["grad_norm"] == pytest.approx(expected.norm, rel=GRADIENT_NOISE)


def test_the_optimizer_gets_the_gradient_clipped_to_max_grad_norm(
    unusual: TrainRecipe, done: SavedRun, expected: PlainStep
) -> None:
    # PyTorch adds 1e-6 to the norm that it divides by.
    clipped = {name: g * unusual.max_grad_norm / (expected.norm + 1e-6) for name, g in expected.gradient.items()}
    assert relative_error(done.first_gradient(), clipped) < GRADIENT_NOISE


def test_a_gradient_below_max_grad_norm_is_left_alone(plain: SavedRun, plain_gradient: dict[str, Tensor]) -> None:
    assert relative_error(plain.first_gradient(), plain_gradient) < GRADIENT_NOISE


SHARES = [0.5, 1.0, *(0.1 + 0.9 * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(1, 6))]
"""Fractions of the peak learning rate in seven steps: two of warmup, then half a cosine down to a tenth."""


def test_the_logged_learning_rate_is_a_warm_up_and_half_a_cosine_to_a_tenth(
    unusual: TrainRecipe, done: SavedRun
) -> None:
    rates = [line["learning_rate"] for line in metrics(done.folder) if "loss" in line]
    assert pytest.approx([0.5, 1.0, 0.914058, 0.689058, 0.410942, 0.185942, 0.1], abs=1e-6) == SHARES
    assert rates == pytest.approx([unusual.learning_rate * share for share in SHARES])


@pytest.mark.parametrize("step", [1, 2, 4, 7])
def test_each_step_is_adamws_at_the_rates_and_the_weight_decay_of_the_recipe(
    step: int, unusual: TrainRecipe, done: SavedRun
) -> None:
    before, after = done.weights(step - 1), done.weights(step)
    first, second = done.moments(step, "exp_avg"), done.moments(step, "exp_avg_sq")
    assert torch.equal(before.pop("common_V"), after["common_V"])
    for name, value in before.items():
        rate = unusual.learning_rate * SHARES[step - 1]
        if ".b_heads." in name:
            rate *= unusual.b_head_learning_rate_factor
        mean = first[name].double() / (1 - 0.9**step)
        size = (second[name].double() / (1 - 0.95**step)).sqrt()
        wanted = value.double() * (1 - rate * unusual.weight_decay) - rate * mean / (size + 1e-8)
        torch.testing.assert_close(after[name].double(), wanted, rtol=1e-6, atol=1e-5 * rate)


def test_a_clipped_gradient_moves_the_weights_less_than_adams_full_step(unusual: TrainRecipe, done: SavedRun) -> None:
    before, after = done.weights(0), done.weights(1)
    full = unusual.learning_rate * SHARES[0] * unusual.b_head_learning_rate_factor
    moved = [(after[name] - before[name]).abs() for name in before if ".b_heads." in name]
    assert 0 < max(float(one.max()) for one in moved) < full
    assert max(float(one.median()) for one in moved) < 0.6 * full


def test_the_second_average_forgets_a_twentieth_per_step(done: SavedRun) -> None:
    squares = {name: 0.05 * g.square() for name, g in done.first_gradient().items()}
    assert relative_error(done.moments(1, "exp_avg_sq"), squares) < 1e-6


@pytest.mark.parametrize("divergence", ["reverse_kl", "tvd"])
def test_a_divergence_of_the_recipe_is_the_one_that_is_trained(
    divergence: str, whole_split: TrainRecipe, trajectories: list[TokenizedTrajectory], tmp_path: Path
) -> None:
    changed = whole_split.model_copy(update={"loss": LossOptions.model_validate({"divergence": divergence})})
    done = saved_run(changed, tmp_path / "run")
    expected = plain_step(changed, done.weights(0), trajectories)
    assert first_line(done)["loss"] == pytest.approx(expected.loss, rel=NOISE)
    assert first_line(done)["grad_norm"] == pytest.approx(expected.norm, rel=GRADIENT_NOISE)


def test_full_views_alone_train_on_what_the_teacher_sees(
    whole_split: TrainRecipe, trajectories: list[TokenizedTrajectory], tmp_path: Path
) -> None:
    done = saved_run(whole_split.model_copy(update={"full_view_share": 1.0, "max_grad_norm": 1e3}), tmp_path / "run")
    full = plain_step(whole_split, done.weights(0), trajectories, full_view=True)
    own = plain_step(whole_split, done.weights(0), trajectories)
    assert first_line(done)["loss"] == pytest.approx(full.loss, rel=NOISE)
    assert relative_error(done.first_gradient(), full.gradient) < GRADIENT_NOISE
    assert abs(full.loss / own.loss - 1) > 10 * NOISE
    assert relative_error(own.gradient, full.gradient) > 100 * GRADIENT_NOISE


def test_half_of_full_views_are_other_ones_in_every_epoch(
    whole_split: TrainRecipe, trajectories: list[TokenizedTrajectory], tmp_path: Path
) -> None:
    """The network hardly changes, so a step's loss shows which trajectories had full views."""
    half = whole_split.model_copy(update={"full_view_share": 0.5, "num_steps": 4, "learning_rate": 1e-12})
    found = losses(run(half, tmp_path / "run"))
    student = PlainStudent(half)
    own, full = ([student.row_losses(t, None, full_view=view).sum() for t in trajectories] for view in (False, True))
    # Every second trajectory hides nothing, so both of its views are the same.
    hidden = [i for i, t in enumerate(trajectories) if len(t.student_ids) < len(t.token_ids)]
    num_rows = sum(len(t.positions) for t in trajectories)
    loss_of = {
        seen: float(sum(full[i] if i in seen else own[i] for i in range(len(trajectories)))) / num_rows
        for size in range(len(hidden) + 1)
        for seen in combinations(hidden, size)
    }
    assert all(abs(a / b - 1) > 2 * NOISE for a, b in pairwise(sorted(loss_of.values())))
    seen = [min(loss_of, key=lambda seen: abs(loss_of[seen] - loss)) for loss in found.values()]
    assert [loss_of[one] for one in seen] == pytest.approx(list(found.values()), rel=NOISE)
    assert len(set(seen)) > 1
    assert 0 < sum(map(len, seen)) < len(seen) * len(hidden)


@pytest.mark.parametrize("size", [3, 8])
def test_the_size_of_micro_batches_does_not_matter(
    size: int, two_steps: TrainRecipe, plain: SavedRun, plain_gradient: dict[str, Tensor], tmp_path: Path
) -> None:
    """Prompts and trajectories have unequal lengths, so a larger micro-batch is padded."""
    together = saved_run(two_steps.model_copy(update={"micro_batch_size": size}), tmp_path / "run")
    assert relative_error(together.first_gradient(), plain_gradient) < GRADIENT_NOISE
    assert losses(together.folder) == pytest.approx(losses(plain.folder), rel=NOISE)


def test_batches_are_shuffled_anew_in_every_epoch(recipe: TrainRecipe, tmp_path: Path) -> None:
    """The network hardly changes, so a step's loss identifies its batch."""
    still = {"arm": "static", "learning_rate": 1e-12, "num_steps": 12, "evaluate_every": 100, "checkpoint_every": 100}
    found = list(losses(run(recipe.model_copy(update=still), tmp_path / "run")).values())
    epochs = [tuple(round(loss, 5) for loss in found[start : start + 3]) for start in range(0, 12, 3)]
    assert all(len(set(epoch)) == 3 for epoch in epochs)
    assert len(set(epochs)) > 1


def test_a_fractional_alpha_reaches_the_exported_adapter(recipe: TrainRecipe, tmp_path: Path) -> None:
    config = recipe.hypernetwork.model_copy(update={"alpha": 2.5})
    changes = {"arm": "static", "hypernetwork": config, "num_steps": 1, "evaluate_every": 100}
    adapter = read_adapter(run(recipe.model_copy(update=changes), tmp_path / "run").adapter)
    assert (adapter.rank, adapter.alpha) == (4, 2.5)
