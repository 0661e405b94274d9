"""Held-out KL of the arms, on what training never saw: other repositories, and other tasks of its own repositories.

    frozen                   the student as it is
    adapter                  with the adapter of the trajectory's own prompt
    adapter_shuffled_prompt  with the adapter of a prompt from another repository

A static adapter is the same whatever the prompt, so it has no arm with a shuffled one. Where tasks of training's own
repositories are held out as well, their arms end in `_tasks`.

The gap between the last two is what conditioning on the prompt is worth; what they share would be learned by a
single static adapter too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from hyperagent.data.tokens import HELD_OUT, HELD_OUT_TASKS, TokenisedTrajectory
from hyperagent.model.adapter import AdapterWeights
from hyperagent_trainer.adapted import AdaptedStudent
from hyperagent_trainer.batches import DistillationData

FROZEN = "frozen"
ADAPTER = "adapter"
SHUFFLED = "adapter_shuffled_prompt"

_ENDINGS = {HELD_OUT: "", HELD_OUT_TASKS: "_tasks"}


class Evaluation:
    """Every held-out split, with everything about it that does not change during training."""

    def __init__(
        self, held_out: Mapping[str, DistillationData], train: DistillationData, *, batch_size: int, seed: int
    ) -> None:
        self._parts = {
            _ENDINGS[split]: SplitEvaluation(data, train, batch_size=batch_size, seed=seed)
            for split, data in held_out.items()
        }

    def run(self, adapted: AdaptedStudent) -> dict[str, float]:
        """Nats per supervised token of every arm of every split."""
        return {f"{arm}{ending}": kl for ending, part in self._parts.items() for arm, kl in part.run(adapted).items()}


class SplitEvaluation:
    """One held-out split."""

    def __init__(self, held_out: DistillationData, train: DistillationData, *, batch_size: int, seed: int) -> None:
        by_length = sorted(range(len(held_out.trajectories)), key=lambda i: len(held_out.trajectories[i].student_ids))
        self._batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        self._data = held_out
        self._foreign_prompts = foreign_prompts(held_out.trajectories, train.trajectories, seed=seed)
        self._frozen_kl: float | None = None

    @torch.no_grad()
    def run(self, adapted: AdaptedStudent) -> dict[str, float]:
        """Nats per supervised token of every arm."""
        adapter_arms = [ADAPTER, SHUFFLED] if adapted.reads_prompt else [ADAPTER]
        arms = adapter_arms if self._frozen_kl is not None else [FROZEN, *adapter_arms]
        sums = dict.fromkeys(arms, 0.0)
        num_rows = 0
        for indices in self._batches:
            batch = self._data[indices].to(adapted.student.head.device)
            num_rows += batch.num_rows
            for arm in arms:
                sums[arm] += float(adapted.loss_sum(batch, self._adapters(adapted, arm, indices)))
        if self._frozen_kl is None:
            # The frozen student answers the same every time.
            self._frozen_kl = sums[FROZEN] / num_rows
        return {FROZEN: self._frozen_kl, **{arm: sums[arm] / num_rows for arm in adapter_arms}}

    def _adapters(self, adapted: AdaptedStudent, arm: str, indices: list[int]) -> AdapterWeights | None:
        if arm == FROZEN:
            return None
        if arm == ADAPTER:
            return adapted.adapters([self._data.trajectories[i].prompt_ids for i in indices])
        return adapted.adapters([self._foreign_prompts[i] for i in indices])


def foreign_prompts(
    held_out: tuple[TokenisedTrajectory, ...], train: tuple[TokenisedTrajectory, ...], *, seed: int
) -> list[NDArray[np.uint32]]:
    """For every held-out trajectory the prompt of another repository: a held-out one, or else a training one."""
    generator = np.random.default_rng(seed)
    chosen = []
    for trajectory in held_out:
        others = [t for t in held_out if t.repo != trajectory.repo] or list(train)
        chosen.append(others[int(generator.integers(len(others)))].prompt_ids)
    return chosen
