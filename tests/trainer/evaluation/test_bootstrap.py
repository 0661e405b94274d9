"""Test the interval around a gain with clusters of very different numbers of rows against all possible draws."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest

from hyperagent_trainer.evaluation.conditioning import conditioning_report

GAINS = {"a": [40.0, 20.0], "b": [3.0], "c": [30.0, 5.0, 1.0], "d": [-2.0], "e": [9.0]}
"""Nats saved by the own prompt, by cluster and sample."""
ROWS = {"a": [10, 5], "b": [900], "c": [60, 30, 10], "d": [400], "e": [3]}


def exact_quantiles(shares: list[float]) -> list[float]:
    """Return the quantiles of nats per row over all 5**5 equally likely draws of five clusters."""
    ratios = sorted(
        sum(sum(GAINS[c]) for c in draw) / sum(sum(ROWS[c]) for c in draw) for draw in product(GAINS, repeat=len(GAINS))
    )
    return [ratios[int(share * len(ratios))] for share in shares]


def test_the_bounds_are_those_of_nats_over_rows_of_a_draw() -> None:
    clusters = [c for c, gains in GAINS.items() for _ in gains]
    gains, rows = (np.array([x for values in table.values() for x in values]) for table in (GAINS, ROWS))
    own = np.full(len(clusters), 50.0)
    found = conditioning_report(
        frozen=own + 10, adapter=own, adapter_shuffled_prompt=own + gains, rows=rows, clusters=clusters
    ).conditioning_gain
    assert found.mean == pytest.approx(106 / 1418)
    # 4,000 draws determine a quantile of 2.5 % to within half a percent.
    for bound, share in ((found.low, 0.025), (found.high, 0.975)):
        assert bound is not None
        below, above = exact_quantiles([share - 0.008, share + 0.008])
        assert below <= bound <= above


def test_two_clusters_have_four_draws() -> None:
    """Half of the draws have both clusters, 100 nats in 1,000 rows; the others have one of them twice."""
    own = np.zeros(2)
    found = conditioning_report(
        frozen=own + 1,
        adapter=own,
        adapter_shuffled_prompt=np.array([99.0, 1.0]),
        rows=np.array([10, 990]),
        clusters=["a", "b"],
    ).conditioning_gain
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((1 / 990, 9.9))
    assert prod((found.low or 0, found.high or 0)) == pytest.approx(0.01)
