"""Gradient of one optimizer step, accumulated over all micro-batches and ranks.

The loss of a step is the mean over the supervised rows of all its trajectories on all ranks. The number of rows is known
from the data, so every rank divides by it from the start, and gradients are summed and never averaged: the result is
the same for any number of ranks and any size of micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hyperagent.errors import DataError, InvalidRequest
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.data.dataset import Batch, DistillationData
from hyperagent_trainer.data.schedule import StepPlan
from hyperagent_trainer.data.training_prompts import TrainingPrompts
from hyperagent_trainer.distributed import Ranks
from hyperagent_trainer.network.adapted_student import AdaptedStudent


@dataclass(frozen=True)
class StepResult:
    """Result of a step over all ranks."""

    loss: float
    """Loss in nats per supervised row."""
    num_tokens: int
    """Number of tokens, context included, padding excluded."""
    data_wait_s: float
    """Longest time in seconds that a rank waited for its batches."""
    hot_hits: int
    hot_misses: int
    hot_degraded: bool
    """Whether the cache's hot tier failed and rows were read from disk instead."""


def accumulate_gradients(
    plan: StepPlan,
    batches: Iterator[Batch],
    adapted: AdaptedStudent,
    data: DistillationData,
    prompts: TrainingPrompts,
    recipe: TrainRecipe,
    ranks: Ranks,
    *,
    step: int,
) -> StepResult:
    """Accumulate the gradient of the step's loss in the network's parameters, identical on every rank.

    Args:
        step: number of the step, which shuffled prompts depend on.

    Raises:
        DataError: the teacher's rows of a trajectory contain NaN or are not normalized.
        CorruptRecord: the cache's record of a trajectory is damaged.
    """
    num_rows = sum(len(data.trajectories[i].positions) for i in plan.indices)
    adapted.network.zero_grad(set_to_none=True)
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    wait_s, tokens, hits, misses, degraded = 0.0, 0, 0, 0, False
    for micro in plan.micro_batches:
        asked_at = time.monotonic()
        batch = next(batches)
        wait_s += time.monotonic() - asked_at
        adapters = adapted.adapters(prompts.of(batch.indices, step=step))
        try:
            loss += adapted.backward(batch, adapters, recipe.loss, scale=0.0 if micro.is_dummy else 1 / num_rows)
        except InvalidRequest as error:
            names = ", ".join(data.trajectories[i].trajectory_id for i in batch.indices)
            raise DataError(f"the teacher's rows of {names} cannot be trained on: {error}") from error
        tokens += 0 if micro.is_dummy else batch.num_tokens
        hits, misses = hits + batch.hot_tier_stats.hits, misses + batch.hot_tier_stats.misses
        degraded |= batch.hot_tier_stats.is_degraded
    ranks.sum_gradients_(adapted.network.parameters())
    sums = torch.tensor([tokens, hits, misses, degraded], dtype=torch.float64, device=ranks.device)
    tokens, hits, misses, failed = map(int, ranks.sum_(sums).tolist())
    return StepResult(float(ranks.sum_(loss)), tokens, ranks.max(wait_s), hits, misses, failed > 0)
