"""Measure the gain from conditioning on the prompt on held-out samples, and decide whether it may be claimed.

    gap closed          (KL_frozen - KL_arm) / KL_frozen
    conditioning gain   KL_adapter_shuffled_prompt - KL_adapter, in nats per supervised row
    over static         KL_static - KL_adapter

Both differences are paired: the same rows under two adapters. Their intervals are 95% percentile bootstraps (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) that draw whole clusters, since samples of one
repository are not independent. With few clusters such an interval is too narrow; below two there is none.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import InvalidRequest
from hyperagent_trainer.evaluation.arms import ADAPTER, FROZEN, SHUFFLED_PROMPT, STATIC

PAYS = "conditioning pays"
STATIC_SUFFICES = "a static LoRA suffices"
NO_STATIC_ARM = "own prompts help; train a static LoRA before claiming that conditioning pays"

_DRAWS = 4000
_TAIL = 0.025


@dataclass(frozen=True)
class Difference:
    """A mean difference in nats per supervised row, with its 95% interval."""

    mean: float
    low: float | None
    """Lower bound of the interval; None with fewer than two clusters."""
    high: float | None
    """Upper bound of the interval; None with fewer than two clusters."""

    @property
    def is_positive(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low is not None and self.low > 0


@dataclass(frozen=True)
class ConditioningReport:
    """Comparison of the arms."""

    kl: dict[str, float]
    """KL in nats per supervised row, by arm."""
    gap_closed: dict[str, float]
    """Share of the frozen student's KL that each other arm removes; negative for an arm that does harm."""
    conditioning_gain: Difference
    """KL with another repository's prompt minus KL with the own prompt."""
    over_static: Difference | None
    """KL of the static arm minus KL with the own prompt; None without a static arm."""
    verdict: str
    """`PAYS`, `STATIC_SUFFICES` or `NO_STATIC_ARM`."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values of every field."""
        return asdict(self)


def conditioning_report(
    *,
    frozen: NDArray[np.float64],
    adapter: NDArray[np.float64],
    adapter_shuffled_prompt: NDArray[np.float64],
    rows: NDArray[np.int64],
    clusters: Sequence[Hashable],
    static: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> ConditioningReport:
    """Compare the arms on the same samples.

    Args:
        frozen, adapter, adapter_shuffled_prompt, static: summed KL of every sample in nats, shape [samples], by arm
            (`hyperagent_trainer.evaluation.arms`).
        rows: number of supervised rows of every sample, shape [samples].
        clusters: the cluster of every sample, such as its repository; samples of one cluster are drawn together.
        seed: seed of the bootstrap.

    Raises:
        InvalidRequest: the arms have different numbers of samples, no samples, or a value that is not finite.
    """
    arms = {FROZEN: frozen, ADAPTER: adapter, SHUFFLED_PROMPT: adapter_shuffled_prompt}
    if static is not None:
        arms[STATIC] = static
    if len({len(clusters), len(rows), *map(len, arms.values())}) != 1 or not len(rows):
        raise InvalidRequest(
            f"arms of {', '.join(f'{name} {len(sums)}' for name, sums in arms.items())} samples cannot be paired; "
            "give every arm the same samples"
        )
    if not all(np.isfinite(sums).all() for sums in arms.values()):
        raise InvalidRequest("an arm has a divergence that is no finite number, so the arms cannot be compared")
    kl = {name: float(sums.sum() / rows.sum()) for name, sums in arms.items()}
    gain = _difference(adapter_shuffled_prompt - adapter, rows, clusters, seed)
    over_static = None if static is None else _difference(static - adapter, rows, clusters, seed)
    return ConditioningReport(
        kl=kl,
        gap_closed={name: (kl[FROZEN] - value) / kl[FROZEN] for name, value in kl.items() if name != FROZEN},
        conditioning_gain=gain,
        over_static=over_static,
        verdict=_verdict(gain, over_static),
    )


def _verdict(gain: Difference, over_static: Difference | None) -> str:
    if not gain.is_positive or (over_static is not None and not over_static.is_positive):
        return STATIC_SUFFICES
    return NO_STATIC_ARM if over_static is None else PAYS


def _difference(
    sums: NDArray[np.float64], rows: NDArray[np.int64], clusters: Sequence[Hashable], seed: int
) -> Difference:
    """Return mean and interval of a ratio: nats over rows, both summed over the clusters of a draw."""
    names = list(dict.fromkeys(clusters))
    place = np.array([names.index(cluster) for cluster in clusters])
    of_cluster, rows_of_cluster = np.bincount(place, weights=sums), np.bincount(place, weights=rows)
    mean = float(of_cluster.sum() / rows_of_cluster.sum())
    if len(names) < 2:
        return Difference(mean, None, None)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=_DRAWS)
    low, high = np.quantile((counts @ of_cluster) / (counts @ rows_of_cluster), [_TAIL, 1 - _TAIL])
    return Difference(mean, float(low), float(high))
