"""Compute 95% intervals of ratios over few clusters, and over training seeds.

Legend of shape suffixes: S training seeds, C clusters, B bootstrap draws.

Samples of one cluster, such as one repository, are not independent, so whole clusters are the units. With the numerators
D_c, the denominators n_c and N = sum of n_c, the ratio R = sum of D_c / N has the residuals e_c = D_c - R n_c and the jackknife
standard error

    SE^2 = (C - 1) / C * sum over c of (e_c / (N - n_c))^2

A bootstrap-t (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5) draws C clusters with replacement and
computes t = (R' - R) / SE' from each draw: unlike the percentiles of R' it knows that SE is itself uncertain and that the
data are skewed. Each bound is the wider one of the bootstrap-t and of Student's t with C - 1 degrees of freedom, since a
bootstrap of a few clusters is sometimes too narrow by chance.

With S >= 3 training seeds R is the mean of their ratios R_s, and their spread is a second source of error, with the half-width
h = t(S - 1) sqrt(Var(R_s) / S). Both half-widths are combined as the root of their sum of squares on each side (Zou and
Donner, Statistics in Medicine 27, 2008). The interaction of seeds and clusters is in both, which errs on the wide side.

`benchmarks/verdict.py` measures how often these intervals hold the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import hypot, isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from hyperagent_trainer.evaluation.student_t import two_sided_t

LEVEL = 0.95
MIN_CLUSTERS_OF_INTERVAL = 4
"""Of three clusters, 11% of the draws hold a single one and have no standard error, so the bootstrap-t has no bounds."""
MIN_SEEDS_OF_INTERVAL = 3

_DRAWS = 1999
# The order statistics of 1,999 draws that leave 2.5% on either side.
_LOW, _HIGH = 49, 1949
# A standard error, or a change of the ratio, below this share of the sample's standard error is zero up to rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval."""

    mean: float
    low: float | None
    """Lower bound; None if there is none: with fewer than `MIN_CLUSTERS_OF_INTERVAL` clusters, or so many exactly equal ones that
    more than 2.5% of the draws have no spread."""
    high: float | None
    """Upper bound; None like `low`."""

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low is not None and self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.high is not None and self.high < 0

    @property
    def text(self) -> str:
        """The interval of a quantity in nats in words."""
        if self.low is None and self.high is None:
            return f"{self.mean:.3g} nats (too few different repositories for an interval)"
        low, high = ("no bound" if bound is None else f"{bound:.3g}" for bound in (self.low, self.high))
        return f"{self.mean:.3g} [{low}, {high}] nats"


def ratio_interval(numerators_SC: NDArray[np.float64], denominators_C: NDArray[np.float64], *, seed: int) -> Interval:
    """Return the ratio of the sums over clusters, averaged over training seeds, with its 95% interval.

    Args:
        numerators_SC: numerator of every seed and cluster, shape [seeds, clusters].
        denominators_C: positive denominator of every cluster, shape [clusters].
        seed: seed of the bootstrap's draws.
    """
    num_seeds, num_clusters = numerators_SC.shape
    ratios_S = numerators_SC.sum(1) / denominators_C.sum()
    mean = float(ratios_S.mean())
    if num_clusters < MIN_CLUSTERS_OF_INTERVAL:
        return Interval(mean, None, None)
    residuals_C = numerators_SC.mean(0) - mean * denominators_C
    # Where one cluster is everything up to rounding, nothing is left without it: not finite, and checked below.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        below, above = _cluster_half_widths(residuals_C, denominators_C, seed)
    if num_seeds >= MIN_SEEDS_OF_INTERVAL:
        of_seeds = two_sided_t(LEVEL, num_seeds - 1) * sqrt(float(ratios_S.var(ddof=1)) / num_seeds)
        below, above = hypot(below, of_seeds), hypot(above, of_seeds)
    return Interval(mean, mean - below if isfinite(below) else None, mean + above if isfinite(above) else None)


def _cluster_half_widths(
    residuals_C: NDArray[np.float64], denominators_C: NDArray[np.float64], seed: int
) -> tuple[float, float]:
    """Return the distances from the ratio to the lower and the upper bound."""
    num = len(denominators_C)
    (error,) = _errors(residuals_C, denominators_C, np.ones((1, num)))[1]
    if error == 0:
        return 0.0, 0.0
    ratios_B, errors_B = _errors(residuals_C, denominators_C, _draws(num, seed))
    # Of a single cluster, or of equal ones, a draw has no standard error: its t is infinite, or 0 if its ratio is the sample's.
    t_B = np.where(np.abs(ratios_B) > _ROUNDING * error, np.copysign(np.inf, ratios_B), 0.0)
    np.divide(ratios_B, errors_B, out=t_B, where=errors_B > _ROUNDING * error)
    t_B.partition([_LOW, _HIGH])
    least = two_sided_t(LEVEL, num - 1)
    return float(error * max(t_B[_HIGH], least)), float(error * max(-t_B[_LOW], least))


def _errors(
    residuals_C: NDArray[np.float64], denominators_C: NDArray[np.float64], counts_BC: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ratio of the residuals and its jackknife standard error in each draw, both of shape [draws]."""
    num = len(denominators_C)
    totals_B = counts_BC @ denominators_C
    ratios_B = (counts_BC @ residuals_C) / totals_B
    # Without one copy of a cluster that is in the draw, a positive denominator is left.
    rest_BC = np.where(counts_BC > 0, totals_B[:, None] - denominators_C, 1.0)
    changes_BC = (residuals_C - ratios_B[:, None] * denominators_C) / rest_BC
    squares_B = np.einsum("bc,bc,bc->b", counts_BC, changes_BC, changes_BC)
    return ratios_B, np.sqrt((num - 1) / num * squares_B)


@lru_cache(maxsize=8)
def _draws(num_clusters: int, seed: int) -> NDArray[np.float64]:
    """Return how often each cluster is in each draw, shape [draws, clusters]."""
    shares = np.full(num_clusters, 1 / num_clusters)
    return np.random.default_rng(seed).multinomial(num_clusters, shares, size=_DRAWS).astype(np.float64)
