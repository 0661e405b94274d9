"""`hyperagent data inspect | show | plan`: inspect trajectories and estimate costs before processing them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hyperagent.cli import data_options as opt
from hyperagent.cli.display import add_bar, print_result, progress_bars, refusals

if TYPE_CHECKING:
    from hyperagent.data.reports.inspect import FileReport
    from hyperagent.data.reports.plan import DataPlan, Estimate
    from hyperagent.data.reports.show import Segment

_STYLES = {"system": "magenta", "user": "green", "tool": "yellow"}
# Escape sequences in recorded terminal output would affect the reader's terminal, so their symbols are shown instead.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def inspect(
    source: opt.Source,
    tokenizer: opt.TokenizerFolder,
    plot: Annotated[Path | None, typer.Option(help="Write a histogram of lengths to this PNG file.")] = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Count the trajectories with more tokens than this.")
    ] = 131_072,
    strict: opt.Strict = False,
    workers: opt.Workers = None,
    as_json: opt.Json = False,
) -> None:
    """Render, tokenize, mask and check every row, regardless of its length, without writing anything."""
    from hyperagent.data.chat.tokenizer import ChatTokenizer
    from hyperagent.data.reports.inspect import inspect_file
    from hyperagent.data.reports.plot import write_histogram

    chat = ChatTokenizer(tokenizer)
    with progress_bars() as bars:
        report = inspect_file(
            source,
            chat,
            strict=strict,
            num_workers=workers,
            progress=add_bar(bars, "inspecting"),
        )
    if plot is not None:
        write_histogram(plot, report, max_tokens=max_tokens)
    result = _inspect_result(report, max_tokens=max_tokens, as_json=as_json)
    result |= {"tokenizer_sha256": chat.identity.tokenizer_sha256, "template_sha256": chat.identity.template_sha256}
    print_result(result | ({"plot": str(plot)} if plot else {}), as_json=as_json)
    if not report.rendered:
        raise typer.Exit(1)


def _inspect_result(report: FileReport, *, max_tokens: int, as_json: bool) -> dict[str, Any]:
    import numpy as np

    lengths = np.sort([row.tokens for row in report.rendered]) if report.rendered else np.zeros(1, dtype=int)
    shares = {"min": 0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}
    return {
        "rows": report.rows,
        "rendered": len(report.rendered),
        "refused": refusals(report.refused, as_json=as_json),
        "tokens": report.tokens,
        "supervised_tokens": report.supervised_tokens,
        "mask_share": round(report.supervised_tokens / max(1, report.tokens), 4),
        "mask_disagreements": report.mask_disagreements,
        "phantom_parameters": report.phantom_parameters,
        "template_mismatches": report.template_mismatches,
        "labels_not_printed": report.not_printed,
        "keys_not_read": report.not_read,
        "lengths": {name: int(np.quantile(lengths, share, method="nearest")) for name, share in shares.items()},
        "longer_than_max_tokens": int((lengths > max_tokens).sum()),
        "roles": report.roles(),
        "without_repository": report.without_repository,
        "repos": len({row.repo for row in report.rendered}),
        "duplicate_issues": report.duplicates,
        "schema_differences": list(report.schema_differences),
    }


def show(
    source: opt.Source,
    row: Annotated[str, typer.Argument(help="A trajectory_id, or a row number starting at 0.")],
    tokenizer: opt.TokenizerFolder,
    view: Annotated[Literal["teacher", "condition", "student"], typer.Option(help="Whose view.")] = "teacher",
    condition: opt.Condition = None,
    internalize: opt.Internalize = None,
    extra: opt.Extra = None,
    extra_in_teacher: opt.ExtraInTeacher = "system",
    as_json: opt.Json = False,
) -> None:
    """Show one row as it is tokenized, with colored roles and the supervised text highlighted."""
    from hyperagent.config import parse
    from hyperagent.data.chat.tokenizer import ChatTokenizer
    from hyperagent.data.files.side_tables import read_joined
    from hyperagent.data.pipeline.views import ViewSettings
    from hyperagent.data.reports.show import find_row, show_row

    views = opt.view_options(condition, internalize, extra_in_teacher, max_tokens=2**31, max_prompt_tokens=2**31)
    settings = parse(views, ViewSettings, source="the options")
    number, found = find_row(source, row)
    text = read_joined(extra, "text").get(str(found["instance_id"])) if extra else None
    segments = show_row(found, number, ChatTokenizer(tokenizer), settings=settings, view=view, extra=text)
    tokens = sum(segment.num_tokens for segment in segments)
    supervised = sum(segment.num_tokens for segment in segments if segment.supervised)
    facts = {name: found[name] for name in ("trajectory_id", "instance_id", "repo", "exit_status", "resolved")}
    facts |= {"view": view, "tokens": tokens, "supervised_tokens": supervised}
    if as_json:
        print_result({**facts, "segments": [asdict(segment) for segment in segments]}, as_json=True)
        return
    print_result(facts, as_json=False)
    _print_segments(segments)


def _print_segments(segments: list[Segment]) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text()
    for segment in segments:
        # Supervised text is underlined, so it is recognizable without colors too.
        style = "bold cyan underline" if segment.supervised else _STYLES.get(segment.role, "dim")
        text.append(segment.text.translate(_VISIBLE), style=style)
    console = Console(soft_wrap=True, highlight=False)
    console.print()
    console.print(text)
    console.print("\nbold and underlined: trained on", style="dim")


def plan(
    source: opt.Source,
    tokenizer: opt.TokenizerFolder,
    machine: Annotated[str, typer.Option(help="Machine, such as 8xh200 or 1xh100.")] = "8xh200",
    epochs: Annotated[int, typer.Option(min=1, help="Number of training epochs.")] = 20,
    top_k: Annotated[int, typer.Option(min=1, help="Ids that the cache keeps per supervised token.")] = 128,
    sample: Annotated[int, typer.Option(min=2, help="Number of rows to tokenize; the rest is extrapolated.")] = 200,
    max_tokens: opt.MaxTokens = 131_072,
    cut: opt.Cut = False,
    internalize: opt.Internalize = None,
    resolved_only: opt.ResolvedOnly = False,
    exit_status: opt.ExitStatus = None,
    seed: opt.Seed = 0,
    workers: opt.Workers = None,
    as_json: opt.Json = False,
) -> None:
    """Estimate the cost of distilling Qwen3-Coder-480B into Qwen3-Coder-Next with this data, before anything runs."""
    import numpy as np

    from hyperagent.cache.format.codecs import COMPACT
    from hyperagent.cache.format.size_estimate import bytes_per_row
    from hyperagent.config import parse
    from hyperagent.data.chat.tokenizer import ChatTokenizer
    from hyperagent.data.pipeline.selection import Selection
    from hyperagent.data.pipeline.tokenize_dataset import measure_rows
    from hyperagent.data.pipeline.views import ViewSettings
    from hyperagent.data.reports.plan import VOCABULARY, estimate, plan_distillation
    from hyperagent.hardware import machine_named
    from hyperagent.topk import DEFAULT_TEMPERATURES

    chosen = machine_named(machine)
    views = parse(
        {"max_tokens": max_tokens, "max_prompt_tokens": 2**31, "cut": cut, "internalized": internalize or ()},
        ViewSettings,
        source="the options",
    )
    selection = Selection(resolved_only=resolved_only, exit_statuses=tuple(exit_status or ()), sample=sample, seed=seed)
    with progress_bars() as bars:
        measured = measure_rows(
            source,
            ChatTokenizer(tokenizer),
            views,
            selection,
            num_workers=workers,
            reading=add_bar(bars, "reading"),
            tokenizing=add_bar(bars, "tokenizing"),
        )
    made = plan_distillation(
        measured.tokens,
        measured.supervised,
        measured.student_tokens,
        rows=measured.num_wanted,
        machine=chosen,
        epochs=epochs,
    )
    row_bytes = bytes_per_row(
        COMPACT.name, top_k=top_k, vocab_size=VOCABULARY, num_temperatures=len(DEFAULT_TEMPERATURES)
    )
    cache = estimate(np.asarray(measured.supervised, dtype=np.float64) * row_bytes, measured.num_wanted)
    print_result(_plan_result(made, cache, machine=machine, epochs=epochs, as_json=as_json), as_json=as_json)


def _plan_result(made: DataPlan, cache: Estimate, *, machine: str, epochs: int, as_json: bool) -> dict[str, Any]:
    from hyperagent.data.reports.plan import STUDENT_UTILISATION, TEACHER_UTILISATION

    facts = {**asdict(made), "cache_bytes": asdict(cache), "teacher_fits": made.teacher_fits}
    assumed = {"teacher_utilization": TEACHER_UTILISATION, "student_utilization": STUDENT_UTILISATION}
    if as_json:
        return {"machine": machine, "epochs": epochs, **facts, **assumed}

    def shown(value: Estimate, unit: float = 1.0) -> str:
        error = f" +- {value.standard_error / unit:,.2f}" if value.standard_error else ""
        return f"{value.total / unit:,.2f}{error}"

    needed = made.teacher_weight_bytes / made.machine_memory_bytes
    return {
        "rows": f"{made.rows:,}, of which {made.sampled_rows:,} were tokenized",
        "tokens": f"{shown(made.tokens, 1e6)} million",
        "supervised": f"{shown(made.supervised_tokens, 1e6)} million",
        "student": f"{shown(made.student_tokens, 1e6)} million tokens an epoch",
        "cache": f"{shown(cache, 1e9)} GB",
        "machine": machine,
        "teacher": f"{made.teacher_gpu_hours:,.1f} GPU-hours, {made.teacher_hours:,.1f} hours on {machine}, at "
        f"{TEACHER_UTILISATION:.0%} of the peak (an assumption)",
        "": f"its weights take {made.teacher_weight_bytes / 1e9:,.0f} GB in bfloat16, {needed:.0%} of the memory: "
        + ("they fit" if made.teacher_fits else "they do not fit; quantize them or take more GPUs"),
        "training": f"{made.student_gpu_hours:,.1f} GPU-hours for {epochs} epochs, {made.student_hours:,.1f} hours on "
        f"{machine}, at {STUDENT_UTILISATION:.0%} of the peak (an assumption), recomputation included",
    }
