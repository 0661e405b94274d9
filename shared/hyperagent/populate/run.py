"""Populate the cache from a tokens file with one or more teachers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from hyperagent.cache.format.codecs import CODECS
from hyperagent.cache.format.size_estimate import bytes_per_row
from hyperagent.cache.maintenance.stats import cache_digest
from hyperagent.data.files.tokens_file import TokensFile, count_tokens_rows, read_data_identity, read_tokens
from hyperagent.errors import HyperagentError
from hyperagent.identity import DataIdentity, TeacherIdentity, require_same
from hyperagent.populate.queue import QueueCounts, WorkItem, WorkQueue
from hyperagent.populate.redis_queue import RedisQueue
from hyperagent.populate.sqlite_queue import SqliteQueue
from hyperagent.populate.worker import Worker
from hyperagent.progress import Progress, no_progress
from hyperagent.wire.client import TeacherClient, TeacherFacts
from hyperagent.wire.outcome import Outcome, PopulateOutcome

_POLL_S = 0.5


@dataclass(frozen=True)
class PopulateReport:
    """Result of a round over all workers."""

    written: int
    present: int
    refused: tuple[str, ...]
    """Trajectories that cannot be scored, each with the reason."""
    quarantined: tuple[str, ...]
    """Trajectories that failed too often, each with the number of tries and the last reason."""
    supervised_tokens: int
    digest: str
    """`cache_digest` of this population's trajectories."""


@dataclass(frozen=True)
class PopulatePlan:
    """Estimate of a population before anything runs."""

    trajectories: int
    tokens: int
    supervised_tokens: int
    cache_bytes: dict[str, int]
    """Bytes of all rows in the cache, by codec."""
    too_long: tuple[str, ...]
    """Trajectories that the teacher would refuse because of their length."""


async def find_teachers(clients: Sequence[TeacherClient], *, wait_s: float) -> TeacherFacts:
    """Wait for all teachers, require that they are identical, and return their identity with the lowest limits.

    Raises:
        ServiceError: a teacher does not answer.
        IdentityMismatch: two teachers differ.
    """
    await asyncio.gather(*(client.wait_until_serving(wait_s) for client in clients))
    facts = await asyncio.gather(*(client.get_teacher() for client in clients))
    for client, other in zip(clients[1:], facts[1:], strict=True):
        require_same(
            f"the teacher at {client.address}",
            expected=facts[0].identity.fingerprint,
            found=other.identity.fingerprint,
            remedy="populate one cache with equal teachers only",
        )
    return TeacherFacts(facts[0].identity, min(f.max_tokens for f in facts), min(f.max_pending_requests for f in facts))


def open_queue(
    place: str, *, data: DataIdentity, teacher: TeacherIdentity, max_tries: int, lease_s: float
) -> WorkQueue:
    """Open the queue for one tokens file and one teacher, in a file or, for a redis:// URL, in Redis.

    Raises:
        StorageError, ConfigError, ServiceError: the queue cannot be used.
    """
    name = blake3(bytes.fromhex(data.fingerprint + teacher.fingerprint)).hexdigest()
    if place.startswith(("redis://", "rediss://", "unix://")):
        return RedisQueue(place, name=name, max_tries=max_tries, lease_s=lease_s)
    return SqliteQueue(Path(place), name=name, max_tries=max_tries, lease_s=lease_s)


def plan(tokens: Path, teacher: TeacherFacts) -> PopulatePlan:
    """Estimate what a population would do.

    Raises:
        DataError: the file cannot be used.
    """
    num_tokens = num_rows = trajectories = 0
    too_long = []
    for item in work_items(tokens):
        trajectories += 1
        if item.num_tokens > teacher.max_tokens:
            too_long.append(f"{item.trajectory_id}: {item.num_tokens:,} tokens, {teacher.max_tokens:,} at most")
            continue
        num_tokens += item.num_tokens
        num_rows += item.num_rows
    facts = teacher.identity
    row = {"top_k": facts.top_k, "vocab_size": facts.vocab_size, "num_temperatures": len(facts.temperatures)}
    sizes = {codec: round(num_rows * bytes_per_row(codec, **row)) for codec in CODECS}
    return PopulatePlan(trajectories, num_tokens, num_rows, sizes, tuple(too_long))


def work_items(tokens: Path) -> Iterator[WorkItem]:
    """Yield every trajectory of a tokens file as a work item; equal ones have the same id."""
    for row, trajectory in enumerate(read_tokens(tokens)):
        digest = blake3(len(trajectory.token_ids).to_bytes(8, "little"))
        digest.update(trajectory.token_ids.astype("<u4", copy=False).tobytes())
        digest.update(trajectory.positions.astype("<u4", copy=False).tobytes())
        yield WorkItem(
            digest.hexdigest(), row, trajectory.trajectory_id, len(trajectory.token_ids), len(trajectory.positions)
        )


async def populate(
    tokens: Path,
    clients: Sequence[TeacherClient],
    queue: WorkQueue,
    *,
    calls_per_teacher: int,
    lease_s: float,
    teacher_wait_s: float,
    on_counts: Callable[[QueueCounts], None] = lambda _counts: None,
) -> PopulateReport:
    """Process the queue, together with any other processes that share it, until all of it is done.

    The loss of a teacher is tolerated as long as another one remains.

    Args:
        calls_per_teacher: number of concurrent trajectories per teacher.
        lease_s, teacher_wait_s: see `Worker`.
        on_counts: called with the queue's counts twice a second.

    Raises:
        HyperagentError: the error that ended the last worker, if items are left.
    """
    data = await asyncio.to_thread(read_data_identity, tokens)
    await asyncio.to_thread(lambda: queue.fill(work_items(tokens)))
    file = TokensFile(tokens)
    workers = [
        Worker(queue, file, client, data, lease_s=lease_s, teacher_wait_s=teacher_wait_s)
        for client in clients
        for _ in range(calls_per_teacher)
    ]
    working = asyncio.gather(*(worker.run() for worker in workers), return_exceptions=True)
    try:
        while not working.done():
            await asyncio.wait({working}, timeout=_POLL_S)
            on_counts(await asyncio.to_thread(queue.counts))
        ends = working.result()
    finally:
        working.cancel()
        await asyncio.wait({working})
    failures = [end for end in ends if end is not None]
    for failure in failures:
        if not isinstance(failure, HyperagentError):
            raise failure
    if failures and not (await asyncio.to_thread(queue.counts)).is_over:
        raise failures[0]
    return await asyncio.to_thread(_queue_report, queue)


async def populate_file_on_teacher(
    tokens: Path, client: TeacherClient, name: str, *, progress: Progress = no_progress
) -> PopulateReport:
    """Have one teacher populate its cache from a copy of `tokens` in its own data folder, without a queue.

    Args:
        tokens: the caller's copy; only its identity and its number of rows are read.
        name: path of the teacher's copy, relative to the teacher's `--data-dir`.
        progress: called with (trajectories done, trajectories).

    Raises:
        NotFound: the teacher has no such file.
        InvalidRequest: the teacher reads no files, or the name is outside its data folder.
        IdentityMismatch: the teacher's file is not `tokens`, or its tokenizer is another.
        ServiceError: the teacher is gone; the rows written so far are kept, and a rerun continues from there.
        StorageError: the teacher cannot write to its cache.
    """
    data = await asyncio.to_thread(read_data_identity, tokens)
    total = await asyncio.to_thread(count_tokens_rows, tokens)
    outcomes: list[PopulateOutcome] = []
    async with aclosing(client.populate_file(name, data=data)) as answers:
        async for outcome in answers:
            outcomes.append(outcome)
            progress(len(outcomes), total)
    return _report(outcomes, quarantined=())


def _queue_report(queue: WorkQueue) -> PopulateReport:
    outcomes = [
        PopulateOutcome(
            trajectory_id=finished.item.trajectory_id,
            outcome=Outcome(finished.outcome),
            num_rows=finished.item.num_rows,
            num_tokens=finished.item.num_tokens,
            cache_key=finished.cache_key,
            record_digest=finished.record_digest,
            reason=finished.reason,
        )
        for finished in queue.finished()
    ]
    quarantined = [f"{s.item.trajectory_id}: failed {s.tries} times, last: {s.reason}" for s in queue.quarantined()]
    return _report(outcomes, quarantined)


def _report(outcomes: Sequence[PopulateOutcome], quarantined: Iterable[str]) -> PopulateReport:
    counts = Counter(one.outcome for one in outcomes)
    return PopulateReport(
        written=counts[Outcome.WRITTEN],
        present=counts[Outcome.PRESENT],
        refused=tuple(f"{one.trajectory_id}: {one.reason}" for one in outcomes if not one.cache_key),
        quarantined=tuple(quarantined),
        supervised_tokens=sum(one.num_rows for one in outcomes),
        digest=cache_digest({one.cache_key: one.record_digest for one in outcomes if one.cache_key}),
    )
