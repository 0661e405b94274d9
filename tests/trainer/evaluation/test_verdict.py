"""Test each rule of the verdict: what is enough for it, and that each part of it is needed."""

from __future__ import annotations

import numpy as np
import pytest

from hyperagent_trainer.evaluation.arms import FROZEN, OWN, SHUFFLED, STATIC, TRAINED_ON_SHUFFLED
from hyperagent_trainer.evaluation.conditioning import ConditioningReport, conditioning_report
from hyperagent_trainer.evaluation.verdict import HARMFUL, PAYS, STATIC_SUFFICES, UNDECIDED

NUM = 20
ROWS = 50


def spread(scale: float, num: int) -> np.ndarray:
    """Return deviations of both signs with mean 0, one for each repository."""
    return scale * np.linspace(-1, 1, num)


def report(
    own: float = 0.5,
    static: float | None = 0.7,
    trained_on_shuffled: float | None = 0.7,
    *,
    num: int = NUM,
    noise: float = 0.02,
    margin: float = 0.05,
    frozen: float = 1.0,
    gain: float = 1.0,
) -> ConditioningReport:
    """Compare arms with these KLs in nats per row; what own prompts save differs by up to `noise` between repositories."""
    kl = {OWN: own + spread(noise, num), SHUFFLED: np.full(num, own + gain)}
    kl |= {arm: np.full(num, x) for arm, x in ((STATIC, static), (TRAINED_ON_SHUFFLED, trained_on_shuffled)) if x}
    sums = {FROZEN: np.full(num, frozen * ROWS), **{arm: ROWS * values for arm, values in kl.items()}}
    return conditioning_report(sums, np.full(num, ROWS), list(range(num)), margin=margin)


def test_conditioning_pays_beyond_the_margin_over_both_baselines() -> None:
    found = report()
    assert found.verdict == PAYS
    assert found.over_static is not None
    assert found.over_static.low is not None
    # The sentence names the saving, its share and what is left of it after the margin.
    assert f"save 0.2 [{found.over_static.low:.3g}, " in found.reason
    assert "(20.0% of the frozen student's KL); less the margin of 5.0%, 0.15 [" in found.reason
    assert "over 20 repositories" in found.reason


def test_a_tiny_gain_does_not_pay_however_certain_it_is() -> None:
    found = report(own=0.5 - 1e-6, static=0.5, trained_on_shuffled=0.7, noise=1e-9)
    assert found.over_static is not None
    assert found.over_static.is_above_zero
    assert found.verdict == STATIC_SUFFICES


def test_the_margin_decides_and_can_be_set() -> None:
    assert report(margin=0.15).verdict == PAYS
    assert report(margin=0.2).verdict == UNDECIDED
    assert report(margin=0.25).verdict == STATIC_SUFFICES
    assert report(own=0.699, margin=0.0, noise=1e-4).verdict == PAYS


def test_a_static_lora_suffices_only_where_the_whole_interval_is_below_the_margin() -> None:
    assert report(static=0.53).verdict == STATIC_SUFFICES
    assert report(static=0.53, trained_on_shuffled=None).verdict == STATIC_SUFFICES
    assert report(static=0.45).verdict == STATIC_SUFFICES
    noisy = report(static=0.53, noise=0.3)
    assert noisy.verdict == UNDECIDED
    assert "an interval that holds 0; hold out more than 20 repositories" in noisy.reason


def test_without_a_baseline_nothing_is_decided() -> None:
    assert report(static=None).verdict == UNDECIDED
    assert "no static arm" in report(static=None).reason
    found = report(trained_on_shuffled=None)
    assert found.verdict == UNDECIDED
    assert "trained on shuffled prompts" in found.reason
    assert report(static=None, trained_on_shuffled=None).verdict is None


def test_a_hypernetwork_that_needs_no_prompt_for_its_advantage_does_not_pay() -> None:
    found = report(trained_on_shuffled=0.51)
    assert found.verdict == UNDECIDED
    assert "the second interval is not above 0" in found.reason


@pytest.mark.parametrize("gain", [-0.01, 0.0])
def test_conditioning_does_not_pay_where_another_repositorys_prompt_is_as_good(gain: float) -> None:
    """Controls that were trained too little lose against a hypernetwork that ignores its prompt."""
    found = report(gain=gain)
    assert found.verdict == UNDECIDED
    assert "over another repository's" in found.reason
    assert report(gain=0.05).verdict == PAYS


def test_fewer_than_eight_repositories_decide_nothing() -> None:
    for arms in ({}, {"static": 0.4}, {"own": 1.5}):
        assert report(**arms, num=8).verdict != UNDECIDED
        found = report(**arms, num=7)
        assert found.verdict == UNDECIDED
        assert found.reason == "7 repositories are fewer than the 8 that a verdict needs"


def test_an_adapter_that_is_worse_than_none_is_harmful_even_if_the_baselines_are_worse_still() -> None:
    found = report(own=1.2, static=1.5, trained_on_shuffled=1.5)
    assert found.beyond_margin[STATIC].is_above_zero
    assert found.verdict == HARMFUL
    assert "save -0.2 [" in found.reason
    assert report(own=1.2, static=None).verdict == HARMFUL


def test_conditioning_does_not_pay_where_the_adapter_may_be_no_better_than_none() -> None:
    found = report(own=0.98, static=1.5, trained_on_shuffled=1.5, noise=0.2)
    assert found.beyond_margin[STATIC].is_above_zero
    assert found.verdict == UNDECIDED
    assert "only 0.02 [" in found.reason


def test_nothing_is_decided_where_the_frozen_student_is_the_teacher() -> None:
    found = report(own=0.0, static=0.2, noise=0.2, frozen=0.0)
    assert found.verdict == UNDECIDED
    assert "no gap to close" in found.reason
    assert report(own=0.5, frozen=0.0).verdict == HARMFUL


def test_the_margin_is_that_of_the_same_repositories() -> None:
    """Own prompts save exactly a tenth of the frozen KL everywhere, which varies by a factor of 20."""
    frozen = np.geomspace(0.1, 2, NUM) * ROWS
    sums = {FROZEN: frozen, OWN: 0.5 * frozen, STATIC: 0.6 * frozen, TRAINED_ON_SHUFFLED: frozen}
    found = conditioning_report(sums, np.full(NUM, ROWS), list(range(NUM)), margin=0.07)
    assert found.over_static is not None
    assert found.over_static.low is not None
    # The bounds in nats alone do not show it.
    assert found.over_static.low < 0.07 * found.kl[FROZEN]
    assert found.verdict == PAYS
