"""`hyperagent data extra | potential`: make a condition that says something, and measure what it can explain."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hyperagent.cli import data_options as opt
from hyperagent.cli.display import add_bar, print_result, progress_bars, refusals

if TYPE_CHECKING:
    from hyperagent.data.reports.potential import Potential, WordCounts

_REPOS_SHOWN = 10


def extra_texts(
    source: opt.Source,
    out: Annotated[Path, typer.Option(help="File of extra texts to write, named *.jsonl.")],
    from_: Annotated[
        Literal["earlier-trajectory"],
        typer.Option("--from", help="Source of the texts: trajectories of earlier issues of the same repository."),
    ] = "earlier-trajectory",
    trajectories: Annotated[int, typer.Option(min=1, max=8, help="Maximum number of trajectories in a text.")] = 1,
    max_characters: Annotated[int, typer.Option(min=1, help="Maximum length of a text in characters.")] = 16_000,
    as_json: opt.Json = False,
) -> None:
    """Write an extra text for every task that has an earlier one in its repository, for `data tokenize --extra`.

    A text holds the earlier issue, what the assistant ran and its final message; never the same issue or a later one.
    """
    from hyperagent.config import parse
    from hyperagent.data.pipeline.earlier_texts import EarlierSettings, write_earlier_texts

    settings = parse(
        {"trajectories": trajectories, "max_characters": max_characters}, EarlierSettings, source="the options"
    )
    with progress_bars() as bars:
        report = write_earlier_texts(
            source, out, settings, reading=add_bar(bars, "reading"), condensing=add_bar(bars, "condensing")
        )
    result: dict[str, Any] = {"extra_file": str(out), "from": from_, **asdict(report)}
    result["refused"] = refusals(report.refused, as_json=as_json)
    if not as_json:
        result["without_earlier"] = f"{len(report.without_earlier)} tasks, which have no text; --json lists them"
    print_result(result, as_json=as_json)


def potential(
    source: opt.Source,
    condition: opt.Condition = None,
    internalize: opt.Internalize = None,
    extra: opt.Extra = None,
    extra_in_teacher: opt.ExtraInTeacher = "system",
    sample: Annotated[int, typer.Option(min=2, help="Maximum number of rows to measure, drawn with the seed.")] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the sample.")] = 0,
    as_json: opt.Json = False,
) -> None:
    """Measure, without any model, how much of what the assistant writes only the hidden parts can explain."""
    from hyperagent.config import parse
    from hyperagent.data.pipeline.tokenize_dataset import read_extra_texts
    from hyperagent.data.pipeline.views import ViewSettings
    from hyperagent.data.reports.potential import measure_potential

    views = parse(opt.view_options(condition, internalize, extra_in_teacher), ViewSettings, source="the options")
    extra_of = read_extra_texts(extra, views)
    with progress_bars() as bars:
        measured = measure_potential(
            source,
            views,
            extra_of=extra_of,
            sample=sample,
            seed=seed,
            reading=add_bar(bars, "reading"),
            counting=add_bar(bars, "counting"),
        )
    print_result(_potential_result(measured, as_json=as_json), as_json=as_json)


def _potential_result(measured: Potential, *, as_json: bool) -> dict[str, Any]:
    from hyperagent.data.reports.potential import LEAST_POTENTIAL, RARE_SHARE

    result: dict[str, Any] = {
        "trajectories": measured.trajectories,
        "left_out": dict(measured.left_out),
        "refused": refusals(measured.refused, as_json=as_json),
        "rare_share": RARE_SHARE,
        "least_potential": LEAST_POTENTIAL,
        "words": {**asdict(measured.total), "potential": measured.total.potential},
        "verdict": measured.verdict,
    }
    if as_json:
        result["repos"] = [asdict(repo) | {"potential": repo.counts.potential} for repo in measured.repos]
        return result
    result["words"] = _sentences(measured.total)
    repos = [repo for repo in measured.repos if repo.counts.rare][:_REPOS_SHOWN]
    result["repos"] = [f"{len(measured.repos)}, {len(repos)} of them with the highest potential:"] + [
        f"{repo.repo} (rows: {repo.trajectories}): {repo.counts.potential:.2%} of {repo.counts.supervised:,} words: "
        + ", ".join(f"{word} {count}" for word, count in repo.examples.items())
        for repo in repos
    ]
    return result


def _sentences(counts: WordCounts) -> list[str]:
    return [
        f"{counts.supervised:,} written by the assistant",
        f"{counts.in_hidden:,} of these stand in the hidden parts",
        f"{counts.unseen:,} of these are not in the student's view before",
        f"{counts.rare:,} of these are rare in other repositories: {counts.potential:.2%} of all",
    ]
