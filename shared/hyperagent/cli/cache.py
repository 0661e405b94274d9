"""`hyperagent cache`: populate the teacher's cache, verify and audit it, and count its contents."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperagent.cli import cache_care, cache_exchange
from hyperagent.cli.cache_care import Json, Root
from hyperagent.cli.display import add_bar, print_result, progress_bars
from hyperagent.errors import ConfigError
from hyperagent.services import Service

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from hyperagent.populate.run import PopulateReport

app = typer.Typer(help="Populate, check, inspect and maintain the teacher's cache.", no_args_is_help=True)
for command in (cache_care.ls, cache_care.plan, cache_care.repair, cache_care.gc, cache_care.compact):
    app.command()(command)
app.command()(cache_exchange.export)
app.command(name="import")(cache_exchange.import_)
app.command()(cache_exchange.publish)

_FIRST_ANSWER_S = 10.0
"""Seconds that teachers have to answer at the start, when a wrong address is more likely than a restart."""


Teachers = Annotated[list[str], typer.Option("--teacher", help="host:port of a teacher; repeatable.")]
TlsCa = Annotated[
    Path | None,
    typer.Option(help="PEM file with trusted certificates; encrypts the traffic.", envvar="HYPERAGENT_TLS_CA"),
]


@app.command()
def populate(
    tokens: Annotated[Path, typer.Argument(help="Tokens file, made by `hyperagent data tokenize`.")],
    teacher: Teachers = [Service.TEACHER.default_address],  # noqa: B006  # typer copies it
    queue: Annotated[
        str | None,
        typer.Option(
            help="Work queue: a file (default: next to the tokens file) or a redis:// URL.", envvar="HYPERAGENT_QUEUE"
        ),
    ] = None,
    calls: Annotated[int, typer.Option(min=1, help="Concurrent trajectories per teacher.")] = 1,
    max_tries: Annotated[int, typer.Option(min=1, help="Failed tries before a trajectory is quarantined.")] = 5,
    lease_s: Annotated[
        float, typer.Option(min=1, help="Seconds until the trajectory of a vanished worker is reassigned.")
    ] = 60.0,
    teacher_wait_s: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a lost teacher to come back.")
    ] = 600.0,
    file_on_teacher: Annotated[
        str | None,
        typer.Option(
            help="Name of the tokens file's copy in the teacher's --data-dir, to be read there instead of sent; "
            "with one --teacher, and without a queue."
        ),
    ] = None,
    tls_ca: TlsCa = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    as_json: Json = False,
) -> None:
    """Have teachers score trajectories into their cache; rows that are already cached are not recomputed.

    Several machines share the work if they use the same redis:// queue. A rerun after an interruption continues; a
    rerun after completion checks everything.
    """
    import asyncio

    settings = _PopulateSettings(queue or f"{tokens}.queue.sqlite", calls, max_tries, lease_s, teacher_wait_s)
    if file_on_teacher is not None and (len(teacher) > 1 or queue is not None):
        raise ConfigError("--file-on-teacher works with one --teacher and without --queue; leave out the others")
    with progress_bars() as bars:
        result = asyncio.run(
            _populate(tokens, teacher, tls_ca, settings, bars, file_on_teacher=file_on_teacher, dry_run=dry_run)
        )
    print_result(result, as_json=as_json)
    if result.get("refused") or result.get("quarantined"):
        raise typer.Exit(1)


@app.command()
def audit(
    root: Root,
    tokens: Annotated[Path, typer.Argument(help="Tokens file that the cache was populated from.")],
    teacher: Annotated[str, typer.Option(help="host:port of the teacher.")] = Service.TEACHER.default_address,
    positions: Annotated[
        int, typer.Option("--positions", "-n", min=1, help="Number of positions to score again.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Seed for drawing the positions.")] = 0,
    max_kl: Annotated[float, typer.Option(min=0, help="Exit with 1 if the mean KL is above this, in nats.")] = 1e-3,
    tls_ca: TlsCa = None,
    as_json: Json = False,
) -> None:
    """Score random cached positions again with the live teacher and report the drift."""
    import asyncio

    with progress_bars() as bars:
        result = asyncio.run(_audit(root, tokens, teacher, tls_ca, positions, seed, bars))
    print_result(result, as_json=as_json)
    if result["kl_nats"]["mean"] > max_kl:
        raise typer.Exit(1)


@app.command()
def verify(root: Root, as_json: Json = False) -> None:
    """Check every byte against its checksum; list damaged records and exit with 1 if there are any."""
    from hyperagent.cache.local import LocalCache
    from hyperagent.cache.maintenance.verify import verify as verify_cache

    with progress_bars() as bars, LocalCache.open(root) as cache:
        report = verify_cache(cache, add_bar(bars, "verifying", unit="bytes"))
    damaged = [
        f"{found.path} at byte {found.offset}: {found.reason}{f' (record {found.key})' if found.key else ''}"
        for found in report.damaged
    ]
    print_result(
        {
            "trajectories": report.trajectories,
            "records": report.records,
            "damaged": damaged,
            "incomplete": list(report.incomplete),
            "leftovers": [str(path) for path in report.leftovers],
            "digest": report.digest,
        },
        as_json=as_json,
    )
    if damaged or report.incomplete:
        raise typer.Exit(1)


@app.command()
def stats(root: Root, as_json: Json = False) -> None:
    """Count trajectories, tokens and bytes, and print the storage distortion in nats."""
    from hyperagent.cache.local import LocalCache
    from hyperagent.cache.maintenance.stats import count

    with progress_bars() as bars, LocalCache.open(root) as cache:
        counted = count(cache, add_bar(bars, "counting", unit="shards"))
        print_result(
            {
                **asdict(counted),
                "bytes_per_token": counted.bytes_per_token,
                "teacher": cache.identity.model,
                "data": cache.data_fingerprints(),
            },
            as_json=as_json,
        )


@dataclass(frozen=True)
class _PopulateSettings:
    queue: str
    calls: int
    max_tries: int
    lease_s: float
    teacher_wait_s: float


async def _populate(
    tokens: Path,
    addresses: list[str],
    tls_ca: Path | None,
    settings: _PopulateSettings,
    bars: Bars,
    *,
    file_on_teacher: str | None,
    dry_run: bool,
) -> dict[str, Any]:
    from hyperagent.auth import read_token
    from hyperagent.data.files.tokens_file import read_data_identity
    from hyperagent.identity import require_same
    from hyperagent.populate.run import find_teachers, open_queue, plan, populate, populate_file_on_teacher
    from hyperagent.wire.client import TeacherClient

    data = read_data_identity(tokens)
    task = bars.add_task("waiting for the teacher", total=None, note="")
    async with AsyncExitStack() as connections:
        clients = [
            await connections.enter_async_context(TeacherClient(address, read_token(), tls_ca=tls_ca))
            for address in addresses
        ]
        facts = await find_teachers(clients, wait_s=_FIRST_ANSWER_S)
        require_same(
            "the tokenizer of the tokens file",
            expected=facts.identity.tokenizer,
            found=data.tokenizer,
            remedy="tokenize with the teacher's tokenizer folder",
        )
        if dry_run:
            return {
                **asdict(plan(tokens, facts)),
                "teachers": addresses,
                "teacher": asdict(facts.identity),
                "queue": settings.queue,
            }
        if file_on_teacher is not None:
            report = await populate_file_on_teacher(
                tokens, clients[0], file_on_teacher, progress=add_bar(bars, "populating", unit="trajectories")
            )
            return _populate_result(report)
        queue = open_queue(
            settings.queue,
            data=data,
            teacher=facts.identity,
            max_tries=settings.max_tries,
            lease_s=settings.lease_s,
        )
        try:
            report = await populate(
                tokens,
                clients,
                queue,
                calls_per_teacher=settings.calls,
                lease_s=settings.lease_s,
                teacher_wait_s=settings.teacher_wait_s,
                on_counts=lambda counts: bars.update(
                    task,
                    description="populating",
                    completed=counts.tokens_over,
                    total=counts.tokens_total,
                    note=f"tokens; {counts.finished:,} trajectories done, {counts.pending + counts.claimed:,} left",
                ),
            )
        finally:
            queue.close()
    return _populate_result(report)


def _populate_result(report: PopulateReport) -> dict[str, Any]:
    return {**asdict(report), "refused": list(report.refused), "quarantined": list(report.quarantined)}


async def _audit(
    root: Path, tokens: Path, address: str, tls_ca: Path | None, positions: int, seed: int, bars: Bars
) -> dict[str, Any]:
    from hyperagent.auth import read_token
    from hyperagent.cache.local import LocalCache
    from hyperagent.populate.audit import audit
    from hyperagent.wire.client import TeacherClient

    cache = LocalCache.open(root)
    async with TeacherClient(address, read_token(), tls_ca=tls_ca) as teacher:
        report = await audit(
            cache,
            tokens,
            teacher,
            num_positions=positions,
            seed=seed,
            progress=add_bar(bars, "auditing", unit="trajectories"),
        )
    return asdict(report)
