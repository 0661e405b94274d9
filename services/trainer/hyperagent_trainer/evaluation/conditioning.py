"""Compare the arms of an evaluation on the same held-out samples: gaps closed, gains with intervals, and the verdict.

    gap closed               (KL_frozen - KL_arm) / KL_frozen
    conditioning gain        KL_shuffled - KL_own
    over static              KL_static - KL_own
    over trained on shuffled KL_trained_on_shuffled - KL_own
    over frozen              KL_frozen - KL_own

KLs are in nats per supervised row: sums of nats over sums of rows. All differences are paired, the same rows under two
adapters, and have intervals over repositories (`intervals`). docs/evaluation.md explains the arms, the formulas and the verdict.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import InvalidRequest
from hyperagent_trainer.evaluation.arms import (
    FROZEN,
    OWN,
    REPORT_ARMS,
    SHUFFLED,
    STATIC,
    TRAINED_ON_SHUFFLED,
    UNTRAINED,
)
from hyperagent_trainer.evaluation.intervals import Interval, ratio_interval
from hyperagent_trainer.evaluation.verdict import Evidence, decide

DEFAULT_MARGIN = 0.05
_BASELINES = (STATIC, TRAINED_ON_SHUFFLED)


@dataclass(frozen=True)
class Difference(Interval):
    """A mean difference in nats per supervised row, with its 95% interval."""

    share: Interval | None
    """The difference as a share of the frozen student's KL; None where that KL is 0 in a repository."""


@dataclass(frozen=True)
class ConditioningReport:
    """Comparison of the arms; differences are KL of the other arm minus KL of the own prompt, None without that arm."""

    kl: dict[str, float]
    """KL in nats per supervised row, by arm; the mean over training seeds."""
    gap_closed: dict[str, float | None]
    """Share of the frozen student's KL that each other arm removes, negative for an arm that does harm; None where the frozen
    student's KL is 0, because there is no gap to close."""
    conditioning_gain: Difference | None
    over_static: Difference | None
    over_trained_on_shuffled: Difference | None
    over_frozen: Difference
    beyond_margin: dict[str, Interval]
    """KL_arm - KL_own - margin * KL_frozen in nats per row, for the static arm and the one trained on shuffled prompts."""
    margin: float
    """Least advantage that counts, as a share of the frozen student's KL."""
    num_clusters: int
    num_seeds: int
    """Number of training seeds. With fewer than three the intervals are about these trained networks, not about others."""
    verdict: str | None
    """`PAYS`, `STATIC_SUFFICES`, `UNDECIDED` or `HARMFUL` of `verdict`; None if no other trained arm was evaluated."""
    reason: str
    """One sentence with the numbers that the verdict follows from, or with the gain where there is no verdict."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values of every field; all numbers are finite."""
        return asdict(self)


def conditioning_report(
    sums: Mapping[str, NDArray[np.float64]],
    rows: NDArray[np.int64],
    clusters: Sequence[Hashable],
    *,
    margin: float = DEFAULT_MARGIN,
    seed: int = 0,
) -> ConditioningReport:
    """Compare the arms on the same samples.

    Args:
        sums: summed KL of every sample in nats by arm (`arms.REPORT_ARMS`), shape [samples], or [seeds, samples] for arms that
            were trained with several seeds. Seed by seed, the arms are paired. `FROZEN` and `OWN` are required.
        rows: number of supervised rows of every sample, shape [samples].
        clusters: the cluster of every sample, such as its repository.
        margin: least advantage that counts, as a share of the frozen student's KL, at least 0 and below 1.
        seed: seed of the bootstrap.

    Raises:
        InvalidRequest: an arm is missing, unknown, of another shape than the others or not finite; a sample has no rows; or the
            margin is out of range.
    """
    _check(sums, rows, clusters, margin)
    compared = _ByCluster.of(sums, rows, clusters, margin, seed)
    num_clusters, kl = len(compared.rows_C), compared.kl
    over = {arm: compared.over(arm) for arm in (FROZEN, SHUFFLED, *_BASELINES) if arm in sums}
    beyond = {arm: compared.beyond_margin(arm) for arm in _BASELINES if arm in sums}
    verdict, reason = None, _without_verdict(over, kl[FROZEN], num_clusters)
    if beyond:
        verdict, reason = decide(Evidence(over[FROZEN], over, beyond, margin, kl[FROZEN], num_clusters))
    return ConditioningReport(
        kl=kl,
        gap_closed={arm: (kl[FROZEN] - kl[arm]) / kl[FROZEN] if kl[FROZEN] else None for arm in kl if arm != FROZEN},
        conditioning_gain=over.get(SHUFFLED),
        over_static=over.get(STATIC),
        over_trained_on_shuffled=over.get(TRAINED_ON_SHUFFLED),
        over_frozen=over[FROZEN],
        beyond_margin=beyond,
        margin=margin,
        num_clusters=num_clusters,
        num_seeds=len(compared.sums_SC[OWN]),
        verdict=verdict,
        reason=reason,
    )


@dataclass(frozen=True)
class _ByCluster:
    """The sums of every cluster; C clusters, S training seeds, or one for an arm that has none."""

    sums_SC: dict[str, NDArray[np.float64]]
    rows_C: NDArray[np.float64]
    margin: float
    seed: int

    @classmethod
    def of(
        cls,
        sums: Mapping[str, NDArray[np.float64]],
        rows: NDArray[np.int64],
        clusters: Sequence[Hashable],
        margin: float,
        seed: int,
    ) -> _ByCluster:
        numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
        places = np.array([numbers[cluster] for cluster in clusters])
        by_cluster = {
            arm: np.array([np.bincount(places, weights=one) for one in np.atleast_2d(sums[arm])], float)
            for arm in REPORT_ARMS
            if arm in sums
        }
        return cls(by_cluster, np.bincount(places, weights=rows).astype(float), margin, seed)

    @property
    def kl(self) -> dict[str, float]:
        """Nats per row by arm, the mean over seeds."""
        return {arm: float(sums_SC.mean(0).sum() / self.rows_C.sum()) for arm, sums_SC in self.sums_SC.items()}

    def over(self, arm: str) -> Difference:
        """Return the KL of the arm minus that of the own prompt."""
        saved_SC, frozen_C = self._saved_over(arm), self.sums_SC[FROZEN][0]
        nats = ratio_interval(saved_SC, self.rows_C, seed=self.seed)
        share = ratio_interval(saved_SC, frozen_C, seed=self.seed) if frozen_C.min() > 0 else None
        return Difference(nats.mean, nats.low, nats.high, share)

    def beyond_margin(self, arm: str) -> Interval:
        """Return by how much the arm's difference is above the margin.

        The margin is subtracted in every cluster, so the uncertainty of the frozen student's KL is in the interval.
        """
        beyond_SC = self._saved_over(arm) - self.margin * self.sums_SC[FROZEN]
        return ratio_interval(beyond_SC, self.rows_C, seed=self.seed)

    def _saved_over(self, arm: str) -> NDArray[np.float64]:
        return self.sums_SC[arm] - self.sums_SC[OWN]


def _without_verdict(over: Mapping[str, Difference], frozen_kl: float, num_clusters: int) -> str:
    arm, words = (SHUFFLED, "other repositories' prompts") if SHUFFLED in over else (FROZEN, "the frozen student")
    gap = "" if frozen_kl else "; the frozen student's KL is 0, so there is no gap to close"
    return f"own prompts save {over[arm].text} over {words}; {num_clusters} repositories{gap}"


def _check(
    sums: Mapping[str, NDArray[np.float64]], rows: NDArray[np.int64], clusters: Sequence[Hashable], margin: float
) -> None:
    """Refuse what cannot be compared."""
    if not 0 <= margin < 1:
        raise InvalidRequest(f"the margin {margin} is no share of the frozen student's KL; give one from 0 to below 1")
    if missing := [arm for arm in (FROZEN, OWN) if arm not in sums]:
        raise InvalidRequest(f"the arm {missing[0]!r} is missing; a report needs {FROZEN!r} and {OWN!r}")
    if unknown := sorted(sums.keys() - set(REPORT_ARMS)):
        raise InvalidRequest(f"there is no arm {unknown[0]!r}; the arms are {', '.join(REPORT_ARMS)}")
    num = len(rows)
    shapes = {arm: (num,) if arm in UNTRAINED else (*np.shape(sums[OWN])[:-1], num) for arm in sums}
    if not num or len(clusters) != num or any(np.shape(sums[arm]) != shapes[arm] for arm in sums):
        found = ", ".join(f"{arm} {list(np.shape(values))}" for arm, values in sums.items())
        raise InvalidRequest(
            f"arms of the shapes {found} cannot be paired with {num} samples in {len(clusters)} entries of clusters; give every arm "
            f"the same samples and every trained arm the same seeds; {' and '.join(UNTRAINED)} have no seeds"
        )
    if not all(np.isfinite(values).all() for values in sums.values()):
        raise InvalidRequest("an arm has a divergence that is no finite number, so the arms cannot be compared")
    if np.min(rows) <= 0:
        raise InvalidRequest("a sample has no supervised rows, so it has no KL per row; leave it out of every arm")
