"""Test on simulated evaluations with known truth how often intervals and verdicts are wrong.

`python benchmarks/verdict.py` measures more settings with more evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import numpy as np
import pytest
from numpy.typing import NDArray
from repositories import FROZEN_KL, Setting, Simulated, by_repository, percentile_interval, simulate, t_interval

from hyperagent_trainer.evaluation.arms import OWN, STATIC
from hyperagent_trainer.evaluation.conditioning import conditioning_report
from hyperagent_trainer.evaluation.intervals import ratio_interval
from hyperagent_trainer.evaluation.verdict import PAYS, STATIC_SUFFICES

EVALUATIONS = 400
MARGIN = 0.05


def most(rate: float) -> int:
    """Return the count that 400 events of this rate exceed with a probability below 0.001."""
    left, count = 1.0, -1
    while left >= 0.001:
        count += 1
        left -= comb(EVALUATIONS, count) * rate**count * (1 - rate) ** (EVALUATIONS - count)
    return count


def evaluations(setting: Setting) -> list[Simulated]:
    generator = np.random.default_rng(0)
    return [simulate(setting, generator) for _ in range(EVALUATIONS)]


Method = Callable[[NDArray[np.float64], NDArray[np.float64]], tuple[float, float]]


def report_interval(nats_SC: NDArray[np.float64], rows_C: NDArray[np.float64]) -> tuple[float, float]:
    found = ratio_interval(nats_SC, rows_C, seed=0)
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def percentiles(nats_SC: NDArray[np.float64], rows_C: NDArray[np.float64]) -> tuple[float, float]:
    return percentile_interval(nats_SC, rows_C, seed=0)


def misses(method: Method, drawn: list[Simulated]) -> int:
    """Return how many 95% intervals of the advantage over the static arm miss its true value."""
    count = 0
    for one in drawn:
        sums = one.sums(MARGIN)
        saved_SC = by_repository(sums[STATIC] - sums[OWN], one.repositories)
        low, high = method(saved_SC, by_repository(one.rows_N.astype(float), one.repositories)[0])
        count += not low <= MARGIN * FROZEN_KL <= high
    return count


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("num", [4, 8])
def test_an_interval_misses_the_truth_as_rarely_as_it_says_and_a_percentile_bootstrap_does_not(
    num: int, num_seeds: int
) -> None:
    drawn = evaluations(Setting(num, "normal", 6, num_seeds))
    assert misses(report_interval, drawn) <= most(0.05)
    assert misses(percentiles, drawn) > most(0.05)


@pytest.mark.parametrize("num", [4, 8])
def test_with_skewed_effects_an_interval_misses_less_than_student_s_t(num: int) -> None:
    """No interval holds its level with eight repositories and a lognormal effect; this one comes closest."""
    drawn = evaluations(Setting(num, "left", 6, 1))
    found = [misses(method, drawn) for method in (report_interval, t_interval, percentiles)]
    assert found == sorted(found)
    assert found[0] <= most(0.09)
    assert found[0] < 0.75 * found[1]


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_wrong_verdicts_are_rare_at_the_margin_and_rarer_without_an_advantage(num_seeds: int) -> None:
    drawn = evaluations(Setting(8, "normal", 6, num_seeds))
    reports = [conditioning_report(one.sums(MARGIN), one.rows_N, one.repositories, margin=MARGIN) for one in drawn]
    found = [report.verdict for report in reports]
    assert found.count(PAYS) <= most(0.025)
    assert found.count(STATIC_SUFFICES) <= most(0.025)
    without = [conditioning_report(one.sums(0.0), one.rows_N, one.repositories, margin=MARGIN) for one in drawn]
    assert [report.verdict for report in without].count(PAYS) <= most(0.005)
    # The verdicts are not rare because there are none.
    large = [conditioning_report(one.sums(0.5), one.rows_N, one.repositories, margin=MARGIN) for one in drawn]
    assert [report.verdict for report in large].count(PAYS) > 0.9 * EVALUATIONS
