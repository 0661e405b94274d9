"""`hyperagent cache`: fill the teacher's cache, check it, count it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from hyperagent.cli.display import print_result, progress_bars

app = typer.Typer(help="Fill the teacher's cache, check it, count it.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Root = Annotated[Path, typer.Argument(help="Folder of the cache.")]


@app.command()
def populate(
    tokens: Annotated[Path, typer.Argument(help="Tokens file, made by `hyperagent data tokenize`.")],
    teacher: Annotated[str, typer.Option(help="The teacher's host:port.")] = "127.0.0.1:8701",
    as_json: Json = False,
) -> None:
    """Have a teacher score trajectories into its cache; what is there already is not computed again."""
    with progress_bars() as bars:
        result = asyncio.run(_populate(tokens, teacher, bars))
    print_result(result, as_json=as_json)
    if result["refused"]:
        raise typer.Exit(1)


@app.command()
def verify(root: Root, as_json: Json = False) -> None:
    """Check every record against its checksum; exits 1 and names the damaged ones if there are any."""
    from hyperagent.cache.store import TopKCache

    with progress_bars() as bars:
        task = bars.add_task("verifying", total=None, note="")
        report = TopKCache.open(root).verify(
            progress=lambda done, total: bars.update(task, completed=done, total=total)
        )
    damaged = [f"{path}: {reason}" for path, reason in report.damaged]
    leftovers = [str(path) for path in report.leftovers]
    print_result({"records": report.records, "damaged": damaged, "leftovers": leftovers}, as_json=as_json)
    if damaged:
        raise typer.Exit(1)


@app.command()
def stats(root: Root, as_json: Json = False) -> None:
    """Count records, tokens and bytes."""
    from hyperagent.cache.store import TopKCache

    cache = TopKCache.open(root)
    counted = cache.stats()
    print_result(
        {
            **asdict(counted),
            "bytes_per_token": counted.bytes_per_token,
            "teacher": cache.identity.model,
            "data": cache.data_fingerprints(),
        },
        as_json=as_json,
    )


async def _populate(tokens: Path, address: str, bars: Progress) -> dict[str, Any]:
    from hyperagent.auth import read_token
    from hyperagent.data.tokens import count_tokens_rows, read_data_identity, read_tokens
    from hyperagent.wire.client import TeacherClient
    from hyperagent.wire.outcome import Outcome

    data = read_data_identity(tokens)
    task = bars.add_task("populating", total=count_tokens_rows(tokens), note="")
    outcomes: Counter[Outcome] = Counter()
    refused: list[str] = []
    rows = 0
    async with TeacherClient(address, read_token()) as teacher:
        trajectories = ((t.trajectory_id, t.token_ids, t.positions) for t in read_tokens(tokens))
        async for item in teacher.populate(trajectories, data=data):
            outcomes[item.outcome] += 1
            rows += item.num_rows
            if item.outcome is Outcome.REFUSED:
                refused.append(f"{item.trajectory_id}: {item.reason}")
            bars.update(task, advance=1, note=f"{rows:,} supervised tokens")
    return {
        "written": outcomes[Outcome.WRITTEN],
        "present": outcomes[Outcome.PRESENT],
        "refused": refused,
        "supervised_tokens": rows,
    }
