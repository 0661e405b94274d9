"""Decide what the report says: the verdict and the sections, as plain text, tables and plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hyperagent_trainer.evaluation.arms import FROZEN, OWN, SHUFFLED, STATIC, TEACHER, TRAINED_ON_SHUFFLED
from hyperagent_trainer.evaluation.intervals import MIN_CLUSTERS_OF_INTERVAL, MIN_SEEDS_OF_INTERVAL
from hyperagent_trainer.evaluation.verdict import MIN_CLUSTERS
from hyperagent_trainer.evaluation_report.blocks import Figure, Paragraph, Section, Table, Terms
from hyperagent_trainer.evaluation_report.details import detail_sections
from hyperagent_trainer.evaluation_report.missing import missing_parts
from hyperagent_trainer.evaluation_report.numbers import count, nats, nats_interval, share, share_interval
from hyperagent_trainer.evaluation_report.plots import gap_plot
from hyperagent_trainer.evaluation_report.schema import ArmResult, Estimate, EvaluationReport
from hyperagent_trainer.evaluation_report.words import ARMS, GLOSSARY, HEADLINES, SPLITS, VIEWS

TITLE = "Evaluation: does reading the prompt pay?"
_INTRODUCTION = (
    "A hypernetwork reads a prompt and generates an adapter, a small set of extra weights, for a small frozen model (the "
    "student). With the adapter, the student should continue recordings of a coding agent the way a large model (the teacher) "
    "does. This page compares such adapters with others that do not use the prompt. Its terms are explained at the end."
)


@dataclass(frozen=True)
class Content:
    """The whole report."""

    title: str
    verdict: str
    """The verdict in one plain sentence."""
    numbers: str
    """The gaps that decide it, in one sentence."""
    reason: str
    """The numbers that the rule of the verdict compared."""
    introduction: str
    sections: tuple[Section, ...]


def content(report: EvaluationReport) -> Content:
    """Return everything that the report says."""
    sections = [_compared(report), _gap(report), _metrics(report), *_differences(report), *detail_sections(report)]
    if missing := missing_parts(report):
        sections.append(Section("Not in this report", [Terms(missing)]))
    sections += [_method(report), Section("Glossary", [Terms(GLOSSARY)])]
    found = report.conditioning
    reason = f"Reason: {found.reason.rstrip('.')}."
    return Content(
        TITLE, HEADLINES[found.verdict], _numbers(report), reason, _INTRODUCTION, tuple(s for s in sections if s.blocks)
    )


def _numbers(report: EvaluationReport) -> str:
    which = SPLITS.get(report.split, f"of the split {report.split!r}")
    where = f"{count(report.num_repositories, 'repository', 'repositories')} {which}"
    own = report.arms[OWN]
    if own.gap_closed is None:
        kl = nats(report.arms[FROZEN].kl)
        return (
            f"On {where}, the frozen student is {kl} nats per row away from the teacher, so there is no gap to close."
        )
    rivals = [
        f"{closed} with {words}"
        for arm, words in (
            (STATIC, "one static LoRA for every prompt"),
            (TRAINED_ON_SHUFFLED, "a hypernetwork trained on wrong prompts"),
            (SHUFFLED, "adapters of other repositories' prompts"),
        )
        if arm in report.arms and (closed := _closed(report.arms[arm]))
    ]
    against = f", against {_listed(rivals)}" if rivals else ""
    return f"On {where}, adapters of the own prompt close {_closed(own, '95% interval ')} of the student's gap to the teacher{against}."


def _listed(items: Sequence[str]) -> str:
    return " and ".join((", ".join(items[:-1]), items[-1])) if len(items) > 1 else items[0]


def _closed(arm: ArmResult, before: str = "") -> str:
    if arm.gap_closed is None:
        return ""
    if arm.gap_low is None:
        return share(arm.gap_closed)
    return f"{share(arm.gap_closed)} ({before}{share_interval(arm.gap_low, arm.gap_high)})"


def _compared(report: EvaluationReport) -> Section:
    compared = [(name, sentence) for arm, (name, sentence) in ARMS.items() if arm in report.arms]
    return Section("What was compared", [Paragraph(VIEWS[report.view]), Terms(compared)])


def _gap(report: EvaluationReport) -> Section:
    plot = gap_plot(report.arms)
    how_to_read = (
        "0% is the student without an adapter and 100% is the teacher; a bar to the left of zero means that the adapter does "
        "harm. The thin line is the 95% interval. The further the bar of the own prompt reaches beyond the bars of the arms "
        "that do not use the prompt, the more it is worth to read it."
    )
    return Section("How much of the gap each arm closes", [] if plot is None else [Figure(plot, how_to_read)])


def _metrics(report: EvaluationReport) -> Section:
    head = (
        *(
            "arm",
            "KL (nats per row)",
            "gap closed",
            "95% interval",
            "top-1 agreement",
            "perplexity",
            "tool calls exact",
        ),
        *("KL, dependent rows", "KL, other rows"),
    )
    rows = [
        (
            *(name, nats(arm.kl), share(arm.gap_closed), share_interval(arm.gap_low, arm.gap_high)),
            *(share(arm.top1_agreement), f"{arm.perplexity:,.3f}", share(arm.tool_calls_exact)),
            *(nats(arm.dependent_kl), nats(arm.other_kl)),
        )
        for key, (name, _) in ARMS.items()
        if (arm := report.arms.get(key))
    ]
    note = "A smaller KL and perplexity are better, and a larger value of everything else. A dash: not measured or not defined."
    return Section("All numbers", [Table("Every arm on the same rows", head, rows), Paragraph(note)])


def _differences(report: EvaluationReport) -> Iterator[Section]:
    """Yield what the own prompt saves over other arms; nothing if no arm was compared."""
    found = report.conditioning
    compared: dict[str, Estimate | None] = {
        FROZEN: found.over_frozen,
        STATIC: found.over_static,
        TRAINED_ON_SHUFFLED: found.over_trained_on_shuffled,
        SHUFFLED: found.conditioning_gain,
    }
    frozen = report.arms[FROZEN].kl
    rows = [
        (
            *(ARMS[arm][0], nats(one.mean), nats_interval(one.low, one.high)),
            share(one.mean / frozen if frozen > 0 else None),
        )
        for arm, one in compared.items()
        if one is not None
    ]
    if rows:
        head = ("own prompt against", "KL saved (nats per row)", "95% interval", "share of the frozen student's KL")
        note = (
            "Each line is the KL of the other arm minus that of the own prompt, on the same rows: above zero, the own prompt "
            f"is better. In the verdict, an advantage counts if it is more than {share(found.margin)} of the frozen student's KL."
        )
        yield Section("What the own prompt saves", [Table("Differences of the KL", head, rows), Paragraph(note)])


def _method(report: EvaluationReport) -> Section:
    run, found = report.run, report.conditioning
    seeds = [
        f"{ARMS[arm][0]} {report.arms[arm].num_seeds}"
        for arm in ARMS
        if arm in report.arms and arm not in (FROZEN, TEACHER)
    ]
    facts = (
        ("run", f"{run.folder}, step {run.step:,}, seed {run.seed}"),
        ("rows", (
            f"{count(report.num_rows, 'row')} of {count(report.num_trajectories, 'trajectory', 'trajectories')} of "
            f"{count(report.num_repositories, 'repository', 'repositories')}, split {report.split}, {report.view} view"
        )),
        ("training seeds", f"{report.num_seeds}; trainings by arm: {', '.join(seeds)}"),
        ("margin", f"{share(found.margin)} of the frozen student's KL"),
        ("averages", (
            "KL(teacher || student) at temperature 1, summed over the rows of all trajectories and divided by their number; the "
            "mean over training seeds"
        )),
        ("intervals", (
            f"95%, over {count(found.num_clusters, 'repository', 'repositories')}: rows of one repository are not independent, so "
            "whole repositories are drawn. Each bound is the wider one of a bootstrap-t with jackknife standard errors and of "
            f"Student's t. From {MIN_SEEDS_OF_INTERVAL} training seeds on, their spread is included; with fewer, the intervals "
            f"are about these trained networks only. Below {MIN_CLUSTERS_OF_INTERVAL} repositories there are no intervals."
        )),
        ("verdict", (
            f"needs at least {MIN_CLUSTERS} repositories. Reading the prompt pays if the own prompt beats the frozen student, and "
            "beats both a static LoRA and training on wrong prompts by more than the margin, each with its whole interval. A "
            "static LoRA suffices if the advantage over it is below the margin with its whole interval. The method is harmful "
            "if it is worse than the frozen student with its whole interval. Otherwise the result is undecided."
        )),
    )  # fmt: skip
    return Section("How it was computed", [Terms(facts)])
