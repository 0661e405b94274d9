"""Evaluate the held-out KL of the arms on other repositories and on other tasks of the training repositories.

The arms are those of `arms`. Where tasks of the training repositories are held out as well, the names of their arms end in
`_tasks`; those of repositories that choose the checkpoint end in `_validation`.

The gap between `adapter_shuffled_prompt` and `adapter` is the gain from conditioning on the prompt; a single static adapter
would learn whatever the two have in common. `conditioning` computes an interval for the gap over the held-out repositories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from hyperagent.data.files.tokens_file import HELD_OUT, HELD_OUT_TASKS, VALIDATION, TokenizedTrajectory
from hyperagent.errors import DataError
from hyperagent_trainer.data.dataset import DistillationData
from hyperagent_trainer.distributed import Ranks
from hyperagent_trainer.evaluation.arms import ADAPTER, FROZEN, OWN, SHUFFLED, SHUFFLED_PROMPT
from hyperagent_trainer.evaluation.conditioning import ConditioningReport, conditioning_report
from hyperagent_trainer.network.adapted_student import AdaptedStudent

_ENDINGS = {HELD_OUT: "", HELD_OUT_TASKS: "_tasks", VALIDATION: "_validation"}


@dataclass(frozen=True)
class HeldOut:
    """The result of one evaluation."""

    kl: dict[str, float]
    """Nats per supervised token, by arm."""
    conditioning: dict[str, ConditioningReport]
    """Comparison of the arms, by split; empty for a static adapter."""

    @property
    def selecting_kl(self) -> float:
        """KL that chooses the checkpoint: on the validation repositories if there are any, else on the reported ones."""
        return self.kl.get(f"{ADAPTER}{_ENDINGS[VALIDATION]}", self.kl[ADAPTER])


class Evaluation:
    """Evaluates every held-out split, keeping everything that does not change during training."""

    def __init__(self, held_out: Mapping[str, DistillationData], train: DistillationData, *, seed: int) -> None:
        self._parts = {
            split: SplitEvaluation(data, [train, *(d for s, d in held_out.items() if s != split)], seed=seed)
            for split, data in held_out.items()
        }

    def run(self, adapted: AdaptedStudent, ranks: Ranks) -> HeldOut:
        """Compute every arm of every split; the ranks share the work, and each returns the whole result."""
        results = {split: part.run(adapted, ranks) for split, part in self._parts.items()}
        kl = {f"{arm}{_ENDINGS[split]}": value for split, r in results.items() for arm, value in r.kl.items()}
        return HeldOut(kl, {split: r.conditioning for split, r in results.items() if r.conditioning is not None})


@dataclass(frozen=True)
class SplitResult:
    """The result of one evaluation on one split."""

    kl: dict[str, float]
    """Nats per supervised token, by arm."""
    conditioning: ConditioningReport | None
    """Comparison of the arms; None for a static adapter."""


class SplitEvaluation:
    """Evaluates one held-out split by trajectory: paired differences need the KL of each one."""

    def __init__(self, held_out: DistillationData, others: Sequence[DistillationData], *, seed: int) -> None:
        """Prepare the evaluation of a split.

        Args:
            held_out: the split to evaluate.
            others: further splits to draw foreign prompts from, in this order, if `held_out` has only one repository.
            seed: seed of the foreign prompts and the bootstrap.
        """
        self._data = held_out
        self._others = others
        self._seed = seed
        # The frozen student's KL is the same in every evaluation.
        self._frozen: NDArray[np.float64] | None = None

    @cached_property
    def _foreign_prompts(self) -> list[NDArray[np.uint32]]:
        # Lazy, because a static adapter reads no prompt and may be trained on a single repository.
        fallbacks = [data.trajectories for data in self._others]
        return foreign_prompts(self._data.trajectories, *fallbacks, seed=self._seed)

    @torch.no_grad()
    def run(self, adapted: AdaptedStudent, ranks: Ranks) -> SplitResult:
        """Compute every arm of every trajectory, and compare them over repositories.

        Raises:
            DataError: the network reads prompts, but there is no prompt of another repository.
        """
        num = len(self._data.trajectories)
        rows = np.array([len(t.positions) for t in self._data.trajectories])
        frozen, adapter, shuffled = sums = np.zeros((3, num))
        # The passes of a sharded student are collective, so every rank must run the same number of them.
        for turn in range(0, num, ranks.size):
            index = min(turn + ranks.rank, num - 1)
            batch = self._data[[index]].to(adapted.student.head.device)
            found = [0.0 if self._frozen is not None else float(adapted.loss_sum(batch, None))]
            found.append(float(adapted.loss_sum(batch, adapted.adapters([self._data.trajectories[index].prompt_ids]))))
            if adapted.reads_prompt:
                found.append(float(adapted.loss_sum(batch, adapted.adapters([self._foreign_prompts[index]]))))
            if turn + ranks.rank < num:
                sums[: len(found), index] = found
        sums[:] = ranks.sum_(torch.from_numpy(sums).to(ranks.device)).cpu().numpy()
        frozen = self._frozen = frozen.copy() if self._frozen is None else self._frozen
        if not adapted.reads_prompt:
            return SplitResult({FROZEN: frozen.sum() / rows.sum(), ADAPTER: adapter.sum() / rows.sum()}, None)
        report = conditioning_report(
            {FROZEN: frozen, OWN: adapter, SHUFFLED: shuffled},
            rows,
            [trajectory.repo for trajectory in self._data.trajectories],
            seed=self._seed,
        )
        metrics = {FROZEN: FROZEN, ADAPTER: OWN, SHUFFLED_PROMPT: SHUFFLED}
        return SplitResult({name: report.kl[arm] for name, arm in metrics.items()}, report)


def foreign_prompts(
    held_out: Sequence[TokenizedTrajectory], *fallbacks: Sequence[TokenizedTrajectory], seed: int
) -> list[NDArray[np.uint32]]:
    """Draw a prompt of another repository for every held-out trajectory.

    Args:
        fallbacks: further trajectories to draw from, in this order, if all of `held_out` belongs to one repository.

    Raises:
        DataError: there is no trajectory of another repository.
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for trajectory in held_out:
        found = ([t for t in pool if t.repo != trajectory.repo] for pool in (held_out, *fallbacks))
        candidates = next(filter(None, found), None)
        if candidates is None:
            raise DataError(
                f"all trajectories are of the repository {trajectory.repo!r}, so its prompts cannot be compared with "
                "another repository's; add a second repository, or set arm: static in the recipe"
            )
        chosen.append(candidates[int(generator.integers(len(candidates)))].prompt_ids)
    return chosen
