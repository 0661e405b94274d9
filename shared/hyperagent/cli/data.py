"""`hyperagent data`: download, inspect, split and tokenize trajectories."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperagent.cli import data_options as opt
from hyperagent.cli.data_condition import extra_texts, potential
from hyperagent.cli.data_look import inspect, plan, show
from hyperagent.cli.display import add_bar, print_result, progress_bars, refusals

if TYPE_CHECKING:
    from hyperagent.data.pipeline.selection import Selected
    from hyperagent.data.pipeline.tokenize_dataset import TokenizeReport

app = typer.Typer(help="Download, inspect, split and tokenize trajectories.", no_args_is_help=True)
app.command()(inspect)
app.command()(show)
app.command()(plan)
app.command("extra")(extra_texts)
app.command()(potential)


@app.command()
def download(
    folder: Annotated[Path, typer.Argument(help="Folder to put the file in.")] = Path("data"),
    as_json: opt.Json = False,
) -> None:
    """Fetch the pinned revision of nebius/SWE-rebench-openhands-trajectories, 2.1 GB, and check it.

    An interrupted download is resumed. Set HF_ENDPOINT to use a mirror of the hub.
    """
    from hyperagent.data.files.download import download_dataset

    print_result(asdict(download_dataset(folder)), as_json=as_json)


@app.command()
def fixture(
    target: Annotated[Path, typer.Argument(help="File to write: Parquet, or JSON Lines if named *.jsonl.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed for drawing the text.")] = 0,
    as_json: opt.Json = False,
) -> None:
    """Write a small synthetic file with every irregularity of the dataset, for trying out a pipeline."""
    from hyperagent.data.fixture.generate import write_fixture

    cases = write_fixture(target, seed=seed)
    rows = [{"trajectory_id": case.trajectory_id, "shows": case.shows, "refusal": case.refusal} for case in cases]
    if as_json:
        print_result({"file": str(target), "rows": rows}, as_json=True)
    else:
        lines = [f"{case.trajectory_id or '-'}: {case.shows}" for case in cases]
        print_result({"file": str(target), "rows": lines}, as_json=False)


@app.command()
def split(
    source: opt.Source,
    resolved_only: opt.ResolvedOnly = False,
    exit_status: opt.ExitStatus = None,
    licenses: opt.Licenses = None,
    license: opt.License = None,
    sample: opt.Sample = None,
    held_out_share: opt.HeldOutShare = 0.2,
    held_out_tasks_share: opt.HeldOutTasksShare = 0.0,
    validation_share: opt.ValidationShare = 0.0,
    by: opt.By = "hash",
    seed: opt.Seed = 0,
    strict: opt.Strict = False,
    as_json: opt.Json = False,
) -> None:
    """Show which rows `data tokenize` would train on and hold out with the same options, without tokenizing."""
    from hyperagent.config import parse
    from hyperagent.data.files.side_tables import read_joined
    from hyperagent.data.pipeline.selection import Selection, select_rows
    from hyperagent.data.pipeline.split import SplitSettings, split_rows

    selection = parse(_selection(resolved_only, exit_status, license, sample, seed), Selection, source="the options")
    settings = parse(
        _split(held_out_share, held_out_tasks_share, validation_share, by, seed),
        SplitSettings,
        source="the options",
    )
    with progress_bars() as bars:
        selected = select_rows(
            source,
            selection,
            license_of=read_joined(licenses, "license_name") if licenses else None,
            strict=strict,
            progress=add_bar(bars, "reading"),
        )
    print_result(_split_result(selected, split_rows(selected.rows, settings), as_json=as_json), as_json=as_json)


def _split_result(selected: Selected, splits: dict[int, str], *, as_json: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"rows": selected.num_rows, "left_out": dict(selected.left_out)}
    for name in sorted(set(splits.values()), reverse=True):
        rows = [row for row in selected.rows if splits[row.number] == name]
        repos = Counter(row.repo for row in rows)
        result[name] = {
            "rows": len(rows),
            "tasks": len({row.issue for row in rows}),
            "repos": dict(repos.most_common()) if as_json else len(repos),
        }
        if as_json:
            result[name]["trajectory_ids"] = [row.name for row in rows]
    return {**result, "refused": refusals(selected.refused, as_json=as_json)}


@app.command()
def tokenize(
    source: opt.Source,
    target: Annotated[Path, typer.Argument(help="Tokens file to write.")],
    tokenizer: opt.TokenizerFolder,
    max_tokens: opt.MaxTokens = 131_072,
    max_prompt_tokens: opt.MaxPromptTokens = 32_768,
    cut: opt.Cut = False,
    condition: opt.Condition = None,
    internalize: opt.Internalize = None,
    extra: opt.Extra = None,
    extra_in_teacher: opt.ExtraInTeacher = "system",
    resolved_only: opt.ResolvedOnly = False,
    exit_status: opt.ExitStatus = None,
    licenses: opt.Licenses = None,
    license: opt.License = None,
    sample: opt.Sample = None,
    held_out_share: opt.HeldOutShare = 0.2,
    held_out_tasks_share: opt.HeldOutTasksShare = 0.0,
    validation_share: opt.ValidationShare = 0.0,
    by: opt.By = "hash",
    seed: opt.Seed = 0,
    strict: opt.Strict = False,
    workers: opt.Workers = None,
    as_json: opt.Json = False,
) -> None:
    """Tokenize trajectories into a file that both the teacher and the trainer read."""
    from hyperagent.config import parse
    from hyperagent.data.chat.tokenizer import ChatTokenizer
    from hyperagent.data.pipeline.tokenize_dataset import JoinedFiles, TokenizeSettings, tokenize_file

    settings = parse(
        {
            "views": opt.view_options(
                condition,
                internalize,
                extra_in_teacher,
                max_tokens=max_tokens,
                max_prompt_tokens=max_prompt_tokens,
                cut=cut,
            ),
            "selection": _selection(resolved_only, exit_status, license, sample, seed),
            "split": _split(held_out_share, held_out_tasks_share, validation_share, by, seed),
        },
        TokenizeSettings,
        source="the options",
    )
    with progress_bars() as bars:
        report = tokenize_file(
            source,
            target,
            ChatTokenizer(tokenizer),
            settings,
            joined=JoinedFiles(licenses, extra),
            strict=strict,
            num_workers=workers,
            reading=add_bar(bars, "reading"),
            tokenizing=add_bar(bars, "tokenizing"),
        )
    print_result(_tokenize_result(target, report, as_json=as_json), as_json=as_json)


def _tokenize_result(target: Path, report: TokenizeReport, *, as_json: bool) -> dict[str, Any]:
    return {
        "tokens_file": str(target),
        "fingerprint": report.fingerprint,
        "rows": report.rows,
        "left_out": dict(report.left_out),
        "chosen": report.chosen,
        **report.splits,
        "tokens": report.tokens,
        "supervised_tokens": report.supervised_tokens,
        "student_tokens": report.student_tokens,
        "prompt_tokens": report.prompt_tokens,
        "too_long": report.too_long,
        "refused": refusals(report.refused, as_json=as_json),
    }


def _selection(
    resolved_only: bool, exit_status: list[str] | None, license: list[str] | None, sample: int | None, seed: int
) -> dict[str, Any]:
    return {
        "resolved_only": resolved_only,
        "exit_statuses": exit_status or (),
        "licenses": license or (),
        "sample": sample,
        "seed": seed,
    }


def _split(
    held_out_share: float, held_out_tasks_share: float, validation_share: float, by: str, seed: int
) -> dict[str, Any]:
    return {
        "held_out_share": held_out_share,
        "held_out_tasks_share": held_out_tasks_share,
        "validation_share": validation_share,
        "by": by,
        "seed": seed,
    }
