"""Decide the order in which training reads trajectories, and which rank computes which of them.

Both are pure functions of the data's lengths and the recipe, so a resumed run continues the same sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

# Number of trajectories that are sorted by length before they are cut into batches: the more, the better the ranks are
# balanced. In a small split it is at most an eighth of them, or every epoch would have the same batches.
_MAX_GROUP = 512
_MIN_BATCHES_PER_GROUP = 8


@dataclass(frozen=True)
class MicroBatch:
    """Trajectories that a rank computes together."""

    indices: tuple[int, ...]
    """Indices of the trajectories in their split."""
    is_dummy: bool
    """Whether its loss is discarded: a rank without work left must still take part in a sharded student's passes."""


@dataclass(frozen=True)
class StepPlan:
    """One rank's part of an optimizer step; every rank has the same number of micro-batches."""

    indices: tuple[int, ...]
    """Indices of the trajectories of all ranks."""
    micro_batches: tuple[MicroBatch, ...]
    efficiency: float
    """Mean over maximum of the ranks' predicted costs: the share of the step in which a rank does not wait."""


def batch_order(
    lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int, full_view_share: float = 0.0
) -> list[list[int]]:
    """Return the batches of one epoch, in which every trajectory occurs once; a pure function of its arguments.

    Trajectories of similar length share a batch, so that no rank waits long for another and there is little padding. The
    order of the batches is random, and nothing depends on the number of ranks.

    Args:
        full_view_share: if above 0, the second half of `lengths` belongs to the full views (`with_full_views`), and about
            this share of the trajectories, drawn anew in every epoch, occurs in its full view.
    """
    generator = np.random.default_rng([seed, epoch])
    num = len(lengths) if full_view_share == 0 else len(lengths) // 2
    shuffled = generator.permutation(num)
    if full_view_share > 0:
        shuffled = shuffled + num * (generator.random(num) < full_view_share)
    wanted = min(_MAX_GROUP, max(_MIN_BATCHES_PER_GROUP * batch_size, num // 8))
    group_size = max(1, wanted // batch_size) * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), group_size):
        group = sorted(shuffled[start : start + group_size].tolist(), key=lambda i: lengths[i])
        batches.extend(group[i : i + batch_size] for i in range(0, len(group), batch_size))
    return [batches[i] for i in generator.permutation(len(batches))]


def batches_from(
    lengths: Sequence[int], *, batch_size: int, seed: int, first_step: int, full_view_share: float = 0.0
) -> Iterator[list[int]]:
    """Yield batches without end from `first_step` on: a resumed run reads what it would have read uninterrupted."""
    order = partial(batch_order, lengths, batch_size=batch_size, seed=seed, full_view_share=full_view_share)
    epoch, skip = divmod(first_step, len(order(epoch=0)))
    while True:
        yield from order(epoch=epoch)[skip:]
        epoch, skip = epoch + 1, 0


def plan_step(step: Sequence[int], costs: Sequence[float], *, rank: int, num_ranks: int, size: int) -> StepPlan:
    """Return one rank's part of a step.

    Args:
        step: indices of the step's trajectories.
        costs: predicted cost of each trajectory of the split.
        rank: the rank whose part is returned, of `num_ranks`.
        size: maximum number of trajectories in a micro-batch.
    """
    # Longest processing time first (Graham 1969): most expensive trajectory to the least loaded rank.
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for index in sorted(step, key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += costs[index]
    num_micro = max(-(-len(share) // size) for share in shares)
    own = [tuple(shares[rank][i : i + size]) for i in range(0, len(shares[rank]), size)]
    cheapest = (min(step, key=lambda i: costs[i]),)
    dummies = [MicroBatch(cheapest, is_dummy=True)] * (num_micro - len(own))
    micro = (*(MicroBatch(indices, is_dummy=False) for indices in own), *dummies)
    return StepPlan(tuple(step), micro, sum(loads) / num_ranks / max(loads))
