"""Decide whether conditioning on the prompt pays, from intervals over repositories.

    conditioning pays      own beats frozen and another repository's prompt, and beats both a static LoRA and a hypernetwork trained on shuffled prompts by more
                           than the margin, each with its whole interval
    a static LoRA suffices the advantage over the static LoRA is below the margin with its whole interval
    harmful                own is worse than frozen with its whole interval
    undecided              otherwise, and always without a static arm, with fewer than `MIN_CLUSTERS` repositories, or where the
                           frozen student is no distance away from the teacher

The margin is a share of the frozen student's KL. An arm trained on shuffled prompts is required for *pays*, because a
hypernetwork has other parameters, initialization and learning rates than a static LoRA and can beat it without its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hyperagent_trainer.evaluation.arms import SHUFFLED, STATIC, TRAINED_ON_SHUFFLED
from hyperagent_trainer.evaluation.intervals import Interval

PAYS = "conditioning pays"
STATIC_SUFFICES = "a static LoRA suffices"
UNDECIDED = "undecided"
HARMFUL = "harmful: the adapter makes the student worse"

MIN_CLUSTERS = 8
"""Fewest repositories for a verdict: below, intervals of skewed differences miss the truth too often (docs/evaluation.md)."""

_WORDS = {STATIC: "a static LoRA", TRAINED_ON_SHUFFLED: "training on shuffled prompts"}


@dataclass(frozen=True)
class Evidence:
    """What a verdict is decided on; all intervals are in nats per supervised row."""

    over_frozen: Interval
    """KL_frozen - KL_own."""
    over: Mapping[str, Interval]
    """KL_arm - KL_own, by arm: `SHUFFLED`, `STATIC` and `TRAINED_ON_SHUFFLED` where they were evaluated."""
    beyond_margin: Mapping[str, Interval]
    """KL_arm - KL_own - margin * KL_frozen, by the same arms."""
    margin: float
    frozen_kl: float
    num_clusters: int


def decide(evidence: Evidence) -> tuple[str, str]:
    """Return the verdict and one sentence with the numbers that it follows from."""
    beyond, num = evidence.beyond_margin, evidence.num_clusters
    if num < MIN_CLUSTERS:
        return UNDECIDED, f"{num} repositories are fewer than the {MIN_CLUSTERS} that a verdict needs"
    if evidence.over_frozen.is_below_zero:
        return HARMFUL, f"own prompts save {evidence.over_frozen.text} over the frozen student, over {num} repositories"
    if evidence.frozen_kl <= 0:
        return UNDECIDED, f"the frozen student's KL is {evidence.frozen_kl:g}, so there is no gap to close"
    if STATIC not in beyond:
        return (
            UNDECIDED,
            "there is no static arm; train a static LoRA of the same rank and targets, and evaluate it as well",
        )
    over_static = _advantage(evidence, STATIC)
    if beyond[STATIC].is_below_zero:
        return STATIC_SUFFICES, f"{over_static}, over {num} repositories"
    if not beyond[STATIC].is_above_zero:
        return UNDECIDED, f"{over_static}, an interval that holds 0; hold out more than {num} repositories"
    if TRAINED_ON_SHUFFLED not in beyond:
        return (
            UNDECIDED,
            f"{over_static}; but no hypernetwork trained on shuffled prompts was evaluated to compare with",
        )
    over_both = f"{over_static}, and {_advantage(evidence, TRAINED_ON_SHUFFLED)}, over {num} repositories"
    if not beyond[TRAINED_ON_SHUFFLED].is_above_zero:
        return UNDECIDED, f"{over_both}: the second interval is not above 0"
    if not evidence.over_frozen.is_above_zero:
        return UNDECIDED, f"{over_both}, but own prompts save only {evidence.over_frozen.text} over the frozen student"
    gain = evidence.over.get(SHUFFLED)
    if gain is not None and not gain.is_above_zero:
        return UNDECIDED, f"{over_both}, but own prompts save only {gain.text} over another repository's"
    return PAYS, over_both


def _advantage(evidence: Evidence, arm: str) -> str:
    share = evidence.over[arm].mean / evidence.frozen_kl
    return (
        f"own prompts save {evidence.over[arm].text} over {_WORDS[arm]} ({share:.1%} of the frozen student's KL); "
        f"less the margin of {evidence.margin:.1%}, {evidence.beyond_margin[arm].text} remain"
    )
