"""List what a report lacks, each with the reason."""

from __future__ import annotations

from hyperagent_trainer.evaluation.arms import OWN
from hyperagent_trainer.evaluation.intervals import MIN_CLUSTERS_OF_INTERVAL
from hyperagent_trainer.evaluation_report.schema import EvaluationReport
from hyperagent_trainer.evaluation_report.words import ARMS, MISSING_ARMS


def missing_parts(report: EvaluationReport) -> list[tuple[str, str]]:
    """Return the name of every part that is not in the report, and why in one line."""
    arms = report.arms.values()
    own = report.arms[OWN]
    parts = (
        (
            "share of the gap",
            own.gap_closed is None,
            "the frozen student is as close to the teacher as can be measured",
        ),
        (
            "intervals",
            own.gap_closed is not None and own.gap_low is None,
            f"they need at least {MIN_CLUSTERS_OF_INTERVAL} repositories, each with a gap",
        ),
        (
            "exact tool calls",
            all(arm.tool_calls_exact is None for arm in arms),
            "the trajectories have no tool calls in a format that is recognized",
        ),
        (
            "dependent and other rows",
            all(arm.dependent_kl is None or arm.other_kl is None for arm in arms),
            "it is not known which rows depend on the condition, or there are none of one kind",
        ),
        ("KL by position", not report.by_position, "it was not measured"),
        ("KL by class of token", not report.by_class, "it was not measured"),
        ("similarity of adapters", report.similarity is None, "it was not measured; it needs two repositories"),
        ("teacher check", report.teacher_check is None, "no result of a teacher check was given"),
        ("texts", not report.texts, "no texts were generated"),
        ("cost", report.cost is None, "it was not measured"),
        ("unusual prompts", report.out_of_distribution is None, "the prompts were not scored"),
        ("effect on unrelated text", report.interference is None, "it was not measured"),
    )
    absent = [(f"arm: {ARMS[arm][0]}", why) for arm, why in MISSING_ARMS.items() if arm not in report.arms]
    return absent + [(name, why) for name, is_missing, why in parts if is_missing]
