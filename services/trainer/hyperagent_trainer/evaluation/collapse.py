"""Recognize a hypernetwork that generates the same adapter for every prompt.

A network that uses its prompt may still generate adapters with a cosine of 0.975, since most of what it changes is useful for
every prompt; one that does not has been seen at 0.989 (docs/experiments.md). So the cosine alone cannot tell: the adapters have
collapsed if they are alike *and* another repository's is as good as the own one.
"""

from __future__ import annotations

from hyperagent_trainer.evaluation.conditioning import ConditioningReport

ALIKE_COSINE = 0.98
"""Mean cosine between the adapters of different prompts above which they are alike."""
LEAST_GAIN = 0.01
"""Least conditioning gain, as a share of the frozen student's KL, at which the prompt matters."""


def have_collapsed(cosine: float | None, report: ConditioningReport | None) -> bool:
    """Return whether different prompts get practically the same adapter.

    Args:
        cosine: mean cosine between the deltas of different prompts; None before training, when they are zero.
        report: comparison of the arms on held-out repositories; None for a static adapter.
    """
    if cosine is None or report is None or report.conditioning_gain is None:
        return False
    return cosine > ALIKE_COSINE and report.conditioning_gain.mean < LEAST_GAIN * report.kl["frozen"]
