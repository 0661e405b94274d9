"""`hyperagent cache ls | plan | repair | gc | compact`: inspect and maintain a cache."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperagent.cli.display import add_bar, print_result, progress_bars

if TYPE_CHECKING:
    from hyperagent.cache.maintenance.compact import CompactReport

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Root = Annotated[Path, typer.Argument(help="Folder of the cache.")]
Tokens = Annotated[Path, typer.Argument(help="Tokens file, made by `hyperagent data tokenize`.")]


def ls(root: Root, as_json: Json = False) -> None:
    """List the trajectories: key, tokens, supervised tokens, blocks."""
    from hyperagent.cache.local import LocalCache

    with LocalCache.open(root) as cache:
        found = [cache.trajectory(key) for key in cache.trajectory_keys()]
    if as_json:
        listed = [
            {"key": one.key, "tokens": one.num_tokens, "supervised_tokens": one.num_rows, "blocks": len(one.blocks)}
            for one in found
        ]
        print_result({"trajectories": listed}, as_json=True)
        return
    for one in found:
        typer.echo(
            f"{one.key}  {one.num_tokens:>8,} tokens  {one.num_rows:>8,} supervised  {len(one.blocks):>5,} blocks"
        )


def plan(
    tokens: Tokens,
    top_k: Annotated[int, typer.Option(min=1, help="Ids kept per row.")] = 128,
    vocab_size: Annotated[
        int, typer.Option(min=1, help="Vocabulary size of the teacher; Qwen3 has 151,936.")
    ] = 151_936,
    as_json: Json = False,
) -> None:
    """Estimate the cache size of a tokens file for each codec, before anything runs."""
    from hyperagent.cache.format.codecs import CODECS
    from hyperagent.cache.format.size_estimate import bytes_per_row
    from hyperagent.data.files.tokens_file import read_tokens
    from hyperagent.topk import DEFAULT_TEMPERATURES

    trajectories = num_tokens = rows = 0
    for trajectory in read_tokens(tokens):
        trajectories += 1
        num_tokens += len(trajectory.token_ids)
        rows += len(trajectory.positions)
    row = {"top_k": top_k, "vocab_size": vocab_size, "num_temperatures": len(DEFAULT_TEMPERATURES)}
    per_row = {codec: bytes_per_row(codec, **row) for codec in CODECS}
    print_result(
        {
            "trajectories": trajectories,
            "tokens": num_tokens,
            "supervised_tokens": rows,
            "bytes_per_token": {codec: round(size, 1) for codec, size in per_row.items()},
            "bytes": {codec: round(rows * size) for codec, size in per_row.items()},
        },
        as_json=as_json,
    )


def repair(root: Root, as_json: Json = False) -> None:
    """Rebuild the index and quarantine damaged shards; exit with 1 if trajectories must be populated again."""
    from hyperagent.cache.maintenance.repair import repair as repair_cache

    with progress_bars() as bars:
        report = repair_cache(root, add_bar(bars, "checking", unit="bytes"))
    print_result(
        {
            "trajectories": report.trajectories,
            "damaged": [f"{found.path} at byte {found.offset}: {found.reason}" for found in report.damaged],
            "quarantined": [str(path) for path in report.quarantined],
            "to_populate": list(report.to_populate),
        },
        as_json=as_json,
    )
    if report.to_populate:
        raise typer.Exit(1)


def gc(
    root: Root,
    keep: Annotated[
        list[Path] | None,
        typer.Option(help="Keep only the trajectories of this tokens file; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove leftovers of killed writers and, with --keep, all trajectories that are in none of the given files."""
    from hyperagent.cache.local import LocalCache
    from hyperagent.cache.maintenance.compact import collect_garbage
    from hyperagent.data.files.tokens_file import read_tokens

    with progress_bars() as bars, LocalCache.open(root, exclusive=True) as cache:
        kept = keep and {cache.key(one.token_ids, one.positions) for file in keep for one in read_tokens(file)}
        report = collect_garbage(cache, kept or None, add_bar(bars, "compacting", unit="shards"))
    result = {name: value for name, value in asdict(report).items() if name != "compacted"}
    print_result({**result, **_compacted(report.compacted)}, as_json=as_json)


def compact(root: Root, as_json: Json = False) -> None:
    """Free the bytes of records that are no longer live, and seal the shards."""
    from hyperagent.cache.local import LocalCache
    from hyperagent.cache.maintenance.compact import compact as compact_cache

    with progress_bars() as bars, LocalCache.open(root) as cache:
        report = compact_cache(cache, add_bar(bars, "compacting", unit="shards"))
    print_result(_compacted(report), as_json=as_json)


def _compacted(report: CompactReport) -> dict[str, Any]:
    return {
        "shards": f"{report.shards_before} -> {report.shards_after}",
        "bytes": report.bytes_after,
        "bytes_freed": report.bytes_before - report.bytes_after,
    }
