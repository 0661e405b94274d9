"""The sections that look closer: positions, kinds of rows and tokens, adapters, the teacher, texts, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hyperagent_trainer.evaluation_report.blocks import Block, Figure, Paragraph, Quote, Section, Table
from hyperagent_trainer.evaluation_report.heat_map import heat_map
from hyperagent_trainer.evaluation_report.numbers import count, duration, nats, share, size
from hyperagent_trainer.evaluation_report.plots import bin_name, dependent_plot, position_plot
from hyperagent_trainer.evaluation_report.schema import (
    Cost,
    EvaluationReport,
    GeneratedText,
    Interference,
    OutOfDistribution,
    Similarity,
    TeacherCheck,
)
from hyperagent_trainer.evaluation_report.words import ARMS


def detail_sections(report: EvaluationReport) -> list[Section]:
    """Return the sections on single aspects; those of parts that were not measured are left out."""
    sections = [_by_position(report), _dependent(report)]
    if report.similarity is not None:
        sections.append(_similarity(report.similarity))
    if report.teacher_check is not None:
        sections.append(_teacher_check(report.teacher_check))
    sections.append(_by_class(report))
    if report.texts:
        sections.append(_texts(report.texts))
    if report.cost is not None:
        sections.append(_cost(report.cost))
    if report.out_of_distribution is not None:
        sections.append(_out_of_distribution(report.out_of_distribution))
    if report.interference is not None:
        sections.append(_interference(report.interference))
    return [section for section in sections if section.blocks]


def _by_position(report: EvaluationReport) -> Section:
    blocks: list[Block] = []
    how_to_read = (
        "A position is the number of tokens before the row in what the student reads, and the number under each point is the first position of its range. Lines that approach each other to the right "
        "mean that the student learns from the trajectory itself what the prompt says."
    )
    if plot := position_plot(report.by_position):
        blocks.append(Figure(plot, how_to_read))
    if report.by_position:
        parts = [(bin_name(one), one.num_rows, one.kl) for one in report.by_position]
        blocks.append(_kl_table("KL in nats per row, by position", "positions", parts, is_folded=bool(blocks)))
    return Section("KL by position", blocks)


def _by_class(report: EvaluationReport) -> Section:
    parts = [(one.name, one.num_rows, one.kl) for one in report.by_class]
    table = _kl_table("KL in nats per row, by class of token", "class of token", parts, is_folded=False)
    return Section("By class of token", [table] if parts else [])


def _kl_table(
    caption: str, first: str, parts: Sequence[tuple[str, int, Mapping[str, float]]], *, is_folded: bool
) -> Table:
    names = [arm for arm in ARMS if any(arm in kl for _, _, kl in parts)]
    rows = [(name, f"{num_rows:,}", *(nats(kl.get(arm)) for arm in names)) for name, num_rows, kl in parts]
    return Table(caption, (first, "rows", *(ARMS[arm][0] for arm in names)), rows, is_folded)


def _dependent(report: EvaluationReport) -> Section:
    plot = dependent_plot(report.arms)
    how_to_read = (
        "On dependent rows the teacher's distribution changes with the condition, so only there can reading the prompt help. On "
        "the other rows an adapter can help without it. The last two columns of the table of all numbers have these values."
    )
    return Section("Rows that depend on the condition", [] if plot is None else [Figure(plot, how_to_read)])


def _similarity(found: Similarity) -> Section:
    num = len(found.repositories)
    rows = []
    for row, name in enumerate(found.repositories):
        others = [column for column in range(num) if column != row]
        cosines = found.cosine[row]
        nearest = max(others, key=lambda column: cosines[column])
        mean = sum(cosines[column] for column in others) / len(others)
        rows.append((f"{row + 1}. {name}", f"{mean:.3f}", found.repositories[nearest], f"{cosines[nearest]:.3f}"))
    head = ("repository", "mean cosine with the others", "most similar repository", "its cosine")
    return Section(
        "How alike the adapters are",
        [
            Paragraph(
                f"The mean cosine between the adapters of two different repositories is {found.mean_cosine:.3f}. Near 1, the "
                "hypernetwork generates almost the same adapter for every prompt. On "
                f"{share(found.own_beats_others)} of the trajectories, the adapter of the own prompt is better than those of other "
                "repositories' prompts; adapters that ignore the prompt would reach about 50%."
            ),
            Figure(heat_map(found), "The table below has the names of the numbered repositories."),
            Table("The repositories of the matrix", head, rows),
        ],
    )


def _teacher_check(found: TeacherCheck) -> Section:
    blocks: list[Block] = [
        Paragraph(
            "An adapter can only carry what the teacher takes from the condition. So the condition was replaced by that of "
            f"another repository, and the teacher's distributions were compared on {count(found.num_rows, 'row')}: they differ "
            f"by {nats(found.kl)} nats per row on average, and {share(found.dependent_share)} of the rows differ by more than "
            f"{found.threshold:g} nats. These are the dependent rows."
        )
    ]
    if found.nothing_to_distill:
        blocks.append(
            Paragraph(
                "The teacher hardly uses the condition, so there is next to nothing to distill. Choose a richer condition, or "
                "hide more of it from the student.",
                is_warning=True,
            )
        )
    return Section("Does the teacher use the condition?", blocks)


def _texts(texts: Sequence[GeneratedText]) -> Section:
    blocks: list[Block] = []
    for prompt in dict.fromkeys(one.prompt for one in texts):
        same = [one for one in texts if one.prompt == prompt]
        blocks.append(Quote("Prompt", prompt))
        for one in same:
            followed = [rule.value for rule in one.rules if rule.followed]
            blocks.append(Quote(f"Text: {ARMS[one.arm][0]}", one.text, followed))
        rules = [
            (ARMS[one.arm][0], rule.name, rule.value, "yes" if rule.followed else "no")
            for one in same
            for rule in one.rules
        ]
        if rules:
            head = ("arm", "rule", "what it requires", "followed")
            blocks.append(Table("Rules that only the condition states", head, rules))
    return Section("What the student writes", blocks)


def _cost(cost: Cost) -> Section:
    text = (
        f"One adapter takes {cost.adapter_ms:,.1f} ms to generate, and has {count(cost.adapter_parameters, 'weight')} "
        f"({size(cost.adapter_bytes)}). The whole evaluation took {duration(cost.evaluation_s)}."
    )
    return Section("Cost", [Paragraph(text)])


def _out_of_distribution(found: OutOfDistribution) -> Section:
    text = (
        "Every prompt has a score for how unlike the training prompts it is, and a prompt whose score is above "
        f"{found.threshold:.4g} is flagged. The median score of the held-out prompts is {found.held_out_median:.4g}, and "
        f"{share(found.share_flagged)} of them are flagged. Nothing in training speaks for the adapter of a flagged prompt."
    )
    return Section("Prompts unlike those of training", [Paragraph(text)])


def _interference(found: Interference) -> Section:
    text = (
        f"On {count(found.num_rows, 'row')} of text that has nothing to do with the prompt, the adapters move the student by "
        f"{nats(found.kl_frozen_to_adapted)} nats per row. Near 0, they leave the student's other abilities as they are."
    )
    return Section("Effect on unrelated text", [Paragraph(text)])
