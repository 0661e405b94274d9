"""Test what a report says of given sums, against plain arithmetic."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hyperagent.errors import InvalidRequest
from hyperagent_trainer.evaluation.arms import (
    EMPTY,
    FROZEN,
    OWN,
    SHUFFLED,
    STATIC,
    TEACHER,
    TRAINED_ON_SHUFFLED,
)
from hyperagent_trainer.evaluation.conditioning import Difference, conditioning_report
from hyperagent_trainer.evaluation.intervals import Interval, ratio_interval

REPOSITORIES = ["a", "b", "b", "c", "d", "e", "e", "e"]
ROWS = np.array([10, 20, 30, 40, 10, 20, 30, 40])
FROZEN_SUMS = np.array([5.0, 8.0, 12.0, 18.0, 6.0, 9.0, 11.0, 21.0])
OWN_SUMS = np.array([3.0, 5.0, 6.0, 9.0, 4.0, 5.0, 5.0, 12.0])
STATIC_SUMS = np.array([4.0, 6.0, 9.0, 14.0, 5.0, 6.0, 9.0, 16.0])


def of_repositories(values: np.ndarray) -> np.ndarray:
    """Return the sums over the samples of a, b, c, d and e."""
    return np.array([values[0], values[1:3].sum(), values[3], values[4], values[5:].sum()])


def interval(nats: np.ndarray, denominators: np.ndarray) -> Interval:
    return ratio_interval(of_repositories(nats)[None], of_repositories(denominators).astype(float), seed=3)


def is_the_same(found: Interval, expected: Interval) -> bool:
    return (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_differences_are_nats_per_row_and_shares_of_the_frozen_kl_over_repositories() -> None:
    sums = {FROZEN: FROZEN_SUMS, OWN: OWN_SUMS, STATIC: STATIC_SUMS, TRAINED_ON_SHUFFLED: FROZEN_SUMS + 1}
    report = conditioning_report({**sums, SHUFFLED: FROZEN_SUMS + 2}, ROWS, REPOSITORIES, margin=0.1, seed=3)
    expected = {
        "over_static": STATIC_SUMS - OWN_SUMS,
        "over_frozen": FROZEN_SUMS - OWN_SUMS,
        "over_trained_on_shuffled": FROZEN_SUMS + 1 - OWN_SUMS,
        "conditioning_gain": FROZEN_SUMS + 2 - OWN_SUMS,
    }
    for name, nats in expected.items():
        found = getattr(report, name)
        assert isinstance(found, Difference)
        assert found.mean == pytest.approx(nats.sum() / 200)
        assert is_the_same(found, interval(nats, ROWS))
        assert found.share is not None
        assert found.share.mean == pytest.approx(nats.sum() / 90)
        assert is_the_same(found.share, interval(nats, FROZEN_SUMS))
    assert report.beyond_margin[STATIC].mean == pytest.approx((STATIC_SUMS.sum() - 49 - 0.1 * 90) / 200)
    assert is_the_same(report.beyond_margin[STATIC], interval(STATIC_SUMS - OWN_SUMS - 0.1 * FROZEN_SUMS, ROWS))
    assert report.kl == pytest.approx(
        {FROZEN: 0.45, OWN: 49 / 200, SHUFFLED: 106 / 200, STATIC: 69 / 200, TRAINED_ON_SHUFFLED: 98 / 200}
    )
    assert report.gap_closed[STATIC] == pytest.approx(21 / 90)
    assert report.gap_closed[SHUFFLED] == pytest.approx(-16 / 90)
    assert (report.num_clusters, report.num_seeds, report.margin) == (5, 1, 0.1)


def test_arms_of_several_seeds_are_averaged_and_their_spread_widens_the_interval() -> None:
    offsets = np.array([[-1.0], [0.0], [1.0]])
    own, static = OWN_SUMS + 0 * offsets, STATIC_SUMS + offsets
    report = conditioning_report({FROZEN: FROZEN_SUMS, OWN: own, STATIC: static}, ROWS, REPOSITORIES, seed=3)
    one = conditioning_report({FROZEN: FROZEN_SUMS, OWN: OWN_SUMS, STATIC: STATIC_SUMS}, ROWS, REPOSITORIES, seed=3)
    assert report.num_seeds == 3
    assert report.kl == pytest.approx(one.kl)
    assert report.over_static is not None
    assert one.over_static is not None
    assert report.over_static.mean == pytest.approx(one.over_static.mean)
    # A seed's ratio deviates by one nat for each of eight samples over 200 rows; t(2) = 4.303.
    half, alone = (found.mean - (found.low or 0) for found in (report.over_static, one.over_static))
    assert half**2 - alone**2 == pytest.approx((4.302653 * 0.04) ** 2 / 3)
    # Without a difference between the seeds of both arms, nothing is added.
    assert is_the_same(report.over_frozen, one.over_frozen)


def test_other_arms_are_listed_without_a_comparison_of_their_own() -> None:
    arms = {TEACHER: 0 * FROZEN_SUMS, EMPTY: FROZEN_SUMS / 2}
    report = conditioning_report({FROZEN: FROZEN_SUMS, OWN: OWN_SUMS, **arms}, ROWS, REPOSITORIES)
    assert report.gap_closed == pytest.approx({OWN: 41 / 90, EMPTY: 0.5, TEACHER: 1.0})
    assert report.conditioning_gain is report.over_static is report.over_trained_on_shuffled is None


def test_a_frozen_student_without_a_gap_has_no_share_of_it() -> None:
    none = np.zeros(8)
    report = conditioning_report({FROZEN: none, OWN: none + 1, STATIC: none}, ROWS, REPOSITORIES)
    assert report.gap_closed == {OWN: None, STATIC: None}
    assert report.over_frozen.share is None
    assert report.over_frozen.mean == pytest.approx(-8 / 200)
    training = conditioning_report({FROZEN: none, OWN: none, SHUFFLED: none}, ROWS, REPOSITORIES)
    assert "the frozen student's KL is 0, so there is no gap to close" in training.reason


@pytest.mark.parametrize("num", [1, 2, 3, 8])
def test_a_report_is_plain_json(num: int) -> None:
    """Also with too few repositories for an interval."""
    sums = {FROZEN: FROZEN_SUMS[:num], OWN: OWN_SUMS[:num], STATIC: STATIC_SUMS[:num]}
    report = conditioning_report(sums, ROWS[:num], list(range(num)))
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["over_static"]["mean"] == pytest.approx(
        float((STATIC_SUMS - OWN_SUMS)[:num].sum() / ROWS[:num].sum())
    )
    assert (written["over_static"]["low"] is None) == (num < 4)
    assert written["num_clusters"] == num
    assert written["reason"] == report.reason


def test_an_evaluation_during_training_has_a_gain_and_no_verdict() -> None:
    sums = {FROZEN: FROZEN_SUMS, OWN: OWN_SUMS, SHUFFLED: FROZEN_SUMS}
    report = conditioning_report(sums, ROWS, REPOSITORIES)
    assert report.verdict is None
    assert report.conditioning_gain is not None
    assert f"{report.conditioning_gain.mean:.3g} [{report.conditioning_gain.low:.3g}, " in report.reason
    assert "5 repositories" in report.reason


def test_what_cannot_be_compared_is_refused() -> None:
    good = {FROZEN: FROZEN_SUMS, OWN: OWN_SUMS}

    def refused(message: str, sums: dict[str, np.ndarray], *, margin: float = 0.05, rows: np.ndarray = ROWS) -> None:
        with pytest.raises(InvalidRequest, match=message):
            conditioning_report(sums, rows, REPOSITORIES, margin=margin)

    refused("the arm 'own' is missing", {FROZEN: FROZEN_SUMS})
    refused("no arm 'adapter'", {**good, "adapter": OWN_SUMS})
    refused("cannot be paired", {**good, STATIC: STATIC_SUMS[:2]})
    refused("cannot be paired", good, rows=ROWS[:2])
    # A static arm of one seed would hide how much static arms differ between seeds.
    refused("the same seeds", {FROZEN: FROZEN_SUMS, OWN: np.tile(OWN_SUMS, (3, 1)), STATIC: STATIC_SUMS})
    refused("have no seeds", {FROZEN: np.tile(FROZEN_SUMS, (3, 1)), OWN: np.tile(OWN_SUMS, (3, 1))})
    refused("no finite number", {**good, SHUFFLED: OWN_SUMS * np.nan})
    refused("no supervised rows", good, rows=np.where(ROWS == 40, 0, ROWS))
    for margin in (-0.1, 1.0, np.nan):
        refused("the margin", good, margin=margin)
    with pytest.raises(InvalidRequest, match="cannot be paired"):
        conditioning_report({arm: sums[:0] for arm, sums in good.items()}, ROWS[:0], [])
