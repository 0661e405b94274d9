"""Compute quantiles of Student's t distribution with an integer number of degrees of freedom."""

from __future__ import annotations

from functools import lru_cache
from math import atan, cos, pi, sin, sqrt


@lru_cache(maxsize=256)
def two_sided_t(level: float, degrees: int) -> float:
    """Return the t for which |T| <= t has the probability `level`, 0 < level < 1, for at least one degree of freedom."""
    low, high = 0.0, 1.0
    while _probability_within(high, degrees) < level:
        low, high = high, 2 * high
    # Each step halves the bracket; floating point ends it after fewer than 64.
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability_within(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def _probability_within(t: float, degrees: int) -> float:
    """Return P(|T| <= t): the finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4."""
    angle = atan(t / sqrt(degrees))
    square = cos(angle) ** 2
    if degrees % 2:
        term = cos(angle)
        total = term if degrees > 1 else 0.0
        for k in range(3, degrees - 1, 2):
            term *= square * (k - 1) / k
            total += term
        return 2 / pi * (angle + sin(angle) * total)
    term = total = 1.0
    for k in range(2, degrees - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return sin(angle) * total
