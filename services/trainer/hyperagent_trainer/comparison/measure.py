"""Measure every arm on every held-out trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.progress import Progress
from hyperagent_trainer.comparison.arms import (
    Prompt,
    empty_prompt,
    foreign_prompts,
    same_repository_prompts,
)
from hyperagent_trainer.comparison.inputs import Comparison, Run
from hyperagent_trainer.comparison.mean_adapter import mean_of_prompts
from hyperagent_trainer.comparison.row_metrics import RowMetrics, row_metrics, teacher_metrics
from hyperagent_trainer.evaluation.arms import (
    EMPTY,
    FROZEN,
    MEAN,
    OWN,
    SAME_REPOSITORY,
    SHUFFLED,
    STATIC,
    TEACHER,
    TRAINED_ON_SHUFFLED,
)
from hyperagent_trainer.network.adapted_student import AdaptedStudent

NUM_DRAWS = 2
"""Prompts of other repositories for each trajectory in the arm `shuffled`."""

_AdaptersOf = Callable[[int], AdapterWeights | None]
"""Adapters a [1, R, I], b [1, O, R] for the trajectory of an index; None for the bare student."""
ArmMetrics = list[list[RowMetrics]]
"""Metrics of one arm, by training seed and trajectory."""


@dataclass(frozen=True)
class _Arm:
    name: str
    adapted: AdaptedStudent
    adapters_of: tuple[_AdaptersOf, ...]
    """One for each draw of prompts."""


def measure(comparison: Comparison, *, seed: int, progress: Progress) -> dict[str, ArmMetrics]:
    """Return the metrics of every arm that the comparison allows, by arm.

    Args:
        seed: seed of the shuffled prompts and of the prompts whose adapters are averaged.
        progress: called with (passes done, passes to do).
    """
    arms = list(_arms(comparison, seed))
    num = len(comparison.data.trajectories)
    total, done = num * sum(len(arm.adapters_of) for arm in arms), 0
    found: dict[str, ArmMetrics] = {}
    for arm in arms:
        one_seed = []
        for index in range(num):
            draws = [_pass(arm.adapted, comparison, index, adapters(index)) for adapters in arm.adapters_of]
            one_seed.append(RowMetrics.mean(draws))
            done += len(draws)
            progress(done, total)
        found.setdefault(arm.name, []).append(one_seed)
    found[TEACHER] = [[teacher_metrics(comparison.data[[index]].rows) for index in range(num)]]
    return found


def _arms(comparison: Comparison, seed: int) -> Iterator[_Arm]:
    trajectories = comparison.data.trajectories
    first = comparison.adapted(comparison.own[0])
    yield _Arm(FROZEN, first, (lambda _: None,))
    for run in comparison.static:
        adapted = comparison.adapted(run)
        yield _Arm(STATIC, adapted, (_for_prompts(adapted, [t.prompt_ids for t in trajectories]),))
    for run in comparison.own:
        adapted = comparison.adapted(run)
        yield _Arm(OWN, adapted, (_for_prompts(adapted, [t.prompt_ids for t in trajectories]),))
        draws = foreign_prompts(trajectories, num_draws=NUM_DRAWS, seed=seed)
        yield _Arm(SHUFFLED, adapted, tuple(_for_prompts(adapted, prompts) for prompts in draws))
        if (prompts := same_repository_prompts(trajectories)) is not None:
            yield _Arm(SAME_REPOSITORY, adapted, (_for_prompts(adapted, prompts),))
        empty = empty_prompt(comparison.student.tokenizer, _condition_parts(run))
        yield _Arm(EMPTY, adapted, (_for_prompts(adapted, [empty] * len(trajectories)),))
        yield _Arm(MEAN, adapted, (_always(mean_of_prompts(adapted, comparison.training.trajectories, seed=seed)),))
    for run in comparison.trained_on_shuffled:
        adapted = comparison.adapted(run)
        yield _Arm(TRAINED_ON_SHUFFLED, adapted, (_for_prompts(adapted, [t.prompt_ids for t in trajectories]),))


@torch.no_grad()
def _pass(adapted: AdaptedStudent, comparison: Comparison, index: int, adapters: AdapterWeights | None) -> RowMetrics:
    student = adapted.student
    batch = comparison.data[[index]].to(student.head.device)
    with adapted.injector.inject(adapters or {}):
        hidden_1TD = student.hidden_states(batch.token_ids_BT)
    return row_metrics(
        hidden_1TD[batch.sample_N, batch.index_N], student.head, batch.rows, vocab_size=student.vocab_size
    )


def _for_prompts(adapted: AdaptedStudent, prompts: list[Prompt]) -> _AdaptersOf:
    def adapters_of(index: int) -> AdapterWeights:
        with torch.no_grad():
            return adapted.adapters([prompts[index]])

    return adapters_of


def _always(adapter: AdapterWeights) -> _AdaptersOf:
    batched = {name: LoRAPair(pair.a[None], pair.b[None]) for name, pair in adapter.items()}
    return lambda _: batched


def _condition_parts(run: Run) -> list[str]:
    return list(run.manifest.data.settings["views"]["condition"])


def own_wins(own: list[RowMetrics], shuffled: list[RowMetrics]) -> float:
    """Return the share of trajectories on which the own prompt's adapter is better than another repository's."""
    return float(np.mean([o.kl_N.sum() < s.kl_N.sum() for o, s in zip(own, shuffled, strict=True)]))
