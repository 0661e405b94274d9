"""The alarm for a hypernetwork that ignores its prompt."""

from __future__ import annotations

import numpy as np
import pytest

from hyperagent_trainer.evaluation.collapse import have_collapsed
from hyperagent_trainer.evaluation.conditioning import ConditioningReport, conditioning_report


def report(gain: float) -> ConditioningReport:
    """A gain in nats per row where the frozen student's KL is 1."""
    rows = np.full(8, 10)
    sums = {"frozen": np.full(8, 10.0), "own": np.full(8, 7.0), "shuffled": np.full(8, 7.0 + 10 * gain)}
    return conditioning_report(sums, rows, [f"repo-{i}" for i in range(8)])


@pytest.mark.parametrize(
    ("cosine", "gain", "expected"),
    [
        (0.989, 0.0035, True),  # the demo before common tokens were masked
        (1.0, -0.001, True),
        (0.975, 0.46, False),  # a network that closes half of the gap with the own prompt
        (0.985, 0.02, False),  # alike, but the own one is better
        (0.95, 0.0, False),  # different, though none is better
    ],
)
def test_adapters_have_collapsed_if_they_are_alike_and_equally_good(cosine: float, gain: float, expected: bool) -> None:
    assert have_collapsed(cosine, report(gain)) is expected


def test_there_is_no_alarm_before_training_or_for_a_static_adapter() -> None:
    assert not have_collapsed(None, report(0))
    assert not have_collapsed(1.0, None)
