"""Test the intervals over clusters and seeds against all possible draws, in a plain computation."""

from __future__ import annotations

from itertools import product
from math import copysign, hypot, inf, sqrt
from statistics import mean, stdev

import numpy as np
import pytest

from hyperagent_trainer.evaluation.intervals import Interval, ratio_interval

NATS = [60.0, 3.0, 36.0, -2.0, 9.0]
ROWS = [15.0, 90.0, 40.0, 70.0, 30.0]
"""Two of the five clusters hold two thirds of the rows and save almost nothing."""
T_OF_4, T_OF_2 = 2.776445, 4.302653


def ratio(draw: tuple[int, ...]) -> float:
    return sum(NATS[c] for c in draw) / sum(ROWS[c] for c in draw)


def jackknife_error(draw: tuple[int, ...]) -> float:
    """Return the standard error from recomputing the ratio without each member of the draw."""
    changes = [ratio(draw[:i] + draw[i + 1 :]) - ratio(draw) for i in range(len(draw))]
    return sqrt((len(draw) - 1) / len(draw) * sum(change**2 for change in changes))


def exact_t_quantiles(shares: list[float]) -> list[float]:
    """Return quantiles of the bootstrap's t over all 5**5 equally likely draws."""
    whole, found = ratio((0, 1, 2, 3, 4)), []
    for draw in product(range(5), repeat=5):
        change = ratio(draw) - whole
        found.append(change / jackknife_error(draw) if len(set(draw)) > 1 else copysign(inf, change))
    return [sorted(found)[int(share * len(found))] for share in shares]


def found_interval(nats: list[list[float]], rows: list[float] = ROWS) -> tuple[float, float, float]:
    found = ratio_interval(np.array(nats), np.array(rows), seed=0)
    assert found.low is not None
    assert found.high is not None
    return found.mean, found.low, found.high


def test_the_bounds_are_those_of_all_possible_draws() -> None:
    center, low, high = found_interval([NATS])
    whole = (0, 1, 2, 3, 4)
    assert center == pytest.approx(ratio(whole))
    error = jackknife_error(whole)
    # 1,999 draws determine a quantile of 2.5 % to within 0.8 %, with two standard errors.
    least, most = (-t for t in exact_t_quantiles([0.033, 0.017]))
    assert T_OF_4 < least <= (high - center) / error <= most
    # On the other side the bootstrap is shorter than Student's t, which is the bound there.
    assert exact_t_quantiles([0.983])[0] < T_OF_4
    assert (center - low) / error == pytest.approx(T_OF_4, rel=1e-6)


def test_no_bound_is_tighter_than_student_s_t() -> None:
    generator = np.random.default_rng(0)
    at_least = 0
    for _ in range(50):
        nats = generator.normal(size=8).tolist()
        center, low, high = found_interval([nats], [1.0] * 8)
        half = 2.364624 * stdev(nats) / sqrt(8)
        assert min(center - low, high - center) >= half * (1 - 1e-5)
        at_least += min(center - low, high - center) <= half * (1 + 1e-5)
    assert at_least > 10


def test_three_seeds_add_their_own_spread_and_two_do_not() -> None:
    offsets = [-0.2, 0.05, 0.15]
    nats = [[x + offset * n for x, n in zip(NATS, ROWS, strict=True)] for offset in offsets]
    center, low, high = found_interval(nats)
    alone, alone_low, alone_high = found_interval([NATS])
    of_seeds = T_OF_2 * stdev(offsets) / sqrt(3)
    assert center == pytest.approx(alone + mean(offsets))
    assert center - low == pytest.approx(hypot(alone - alone_low, of_seeds))
    assert high - center == pytest.approx(hypot(alone_high - alone, of_seeds))
    two = found_interval(nats[:2])
    assert two[0] - two[1] == pytest.approx(alone - alone_low)


def test_four_clusters_have_bounds_and_three_have_none() -> None:
    three = ratio_interval(np.array([NATS[:3]]), np.array(ROWS[:3]), seed=0)
    assert three == Interval(three.mean, None, None)
    assert three.mean == pytest.approx(99 / 145)
    _, low, high = found_interval([NATS[:4]], ROWS[:4])
    assert np.isfinite([low, high]).all()


def test_clusters_that_agree_exactly_leave_no_doubt() -> None:
    assert found_interval([[0.5 * n for n in ROWS]]) == pytest.approx((0.5, 0.5, 0.5))
    assert found_interval([[0.0] * 5]) == (0.0, 0.0, 0.0)


def test_repositories_that_save_the_same_as_the_whole_do_not_undo_the_interval() -> None:
    """Draws of the three equal clusters alone, 8 % of all, have no standard error, but no error either."""
    center, low, high = found_interval([[1.0, 4.0, 5.0, 1.0, 9.0]], [10.0, 50.0, 40.0, 10.0, 90.0])
    assert center == pytest.approx(0.1)
    assert low < center < high


def test_draws_without_a_spread_leave_a_side_unbounded() -> None:
    """Six of eight repositories save nothing at all: in 10 % of the draws nothing is saved, with no standard error."""
    nats = [0.0] * 6 + [3.0, 5.0]
    found = ratio_interval(np.array([nats]), np.ones(8), seed=0)
    assert found.low is not None
    assert found.low == pytest.approx(1.0 - 2.364624 * stdev(nats) / sqrt(8), rel=1e-5)
    assert found.high is None
    assert found.text == f"1 [{found.low:.3g}, no bound] nats"


def test_a_cluster_that_holds_all_rows_up_to_rounding_gives_no_interval_but_no_error() -> None:
    found = ratio_interval(np.array([[1.0, 2.0, 3.0, 4.0, 5.0]]), np.array([1e300, 1.0, 1.0, 1.0, 1.0]), seed=0)
    assert (found.low, found.high) == (None, None)


def test_an_interval_does_not_depend_on_units() -> None:
    center, low, high = found_interval([NATS])
    scaled = found_interval([[1e-6 * x for x in NATS]], [1e3 * n for n in ROWS])
    assert scaled == pytest.approx(tuple(1e-9 * x for x in (center, low, high)))
