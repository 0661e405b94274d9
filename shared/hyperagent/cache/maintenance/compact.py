"""Freeing space: records that count are copied into new shards, and the old files go.

A process may be killed at any moment of it: what was copied is durable before the index is pointed there, and the old file
is deleted last. Others may read meanwhile; who finds a shard gone asks the index again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from hyperagent.cache.format.record import Kind
from hyperagent.cache.format.shard import OPEN, SEALED, SHARD_HEADER_BYTES, ShardWriter, shard_paths
from hyperagent.cache.index import Entry
from hyperagent.cache.local import LocalCache
from hyperagent.errors import StorageError
from hyperagent.progress import Progress, no_progress
from hyperagent.storage.files import fsync_directory, is_temporary, remedy_of

_COPY_BYTES = 8 << 20
log = structlog.get_logger()


@dataclass(frozen=True)
class CompactReport:
    """What compaction has done."""

    shards_before: int
    shards_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class CollectReport:
    """What collecting garbage has done."""

    trajectories_removed: int
    blocks_removed: int
    leftovers_removed: int
    compacted: CompactReport


def compact(cache: LocalCache, progress: Progress = no_progress) -> CompactReport:
    """Rewrite shards that hold dead bytes, or are small, and seal what comes of it.

    Raises:
        CorruptRecord: a record that counts is damaged; nothing is lost, and `repair` quarantines its shard.
        StorageError: the file system refused; what was compacted until then stays so.
    """
    cache.release_shard()
    before = shard_paths(cache.shards)
    bytes_before = _size(before)
    # Holding the locks keeps everybody, this process too, from appending to what is about to go.
    with owned_shards(cache, [path for path in before if path.suffix == OPEN]) as owned:
        wasteful = [path for path in before if path in owned or (path.suffix == SEALED and _is_wasteful(cache, path))]
        # A single small shard that is all alive would only be copied.
        if len(wasteful) > 1 or any(path in owned or _dead_bytes(cache, path) for path in wasteful):
            for done, path in enumerate(wasteful):
                progress(done, len(wasteful))
                copy_records(cache, cache.index.entries(path.stem))
                delete_shard(cache, path)
            cache.seal()
    after = shard_paths(cache.shards)
    return CompactReport(len(before), len(after), bytes_before, _size(after))


def collect_garbage(cache: LocalCache, keep: Iterable[str] | None, progress: Progress = no_progress) -> CollectReport:
    """Remove trajectories that are not in `keep`, blocks that no trajectory needs, and what killed writers left.

    Args:
        cache: opened with `exclusive`, so that nobody reads what is removed.
        keep: keys of trajectories that stay; without it all of them.

    Raises:
        As `compact`.
    """
    kept = set(cache.trajectory_keys()) if keep is None else set(keep) & set(cache.trajectory_keys())
    removed = [bytes.fromhex(key) for key in cache.trajectory_keys() if key not in kept]
    needed = {block.key for key in kept for block in cache.trajectory(key).blocks}
    unneeded = [key for key in cache.index.keys(Kind.BLOCK) if key not in needed]
    with cache.index.transaction():
        cache.index.remove([*removed, *unneeded])
    leftovers = [path for path in cache.root.rglob("*") if is_temporary(path)]
    for path in leftovers:
        path.unlink()
    return CollectReport(len(removed), len(unneeded), len(leftovers), compact(cache, progress))


def copy_records(cache: LocalCache, entries: Iterable[Entry]) -> None:
    """Write records again, into the shard that is being written, and have the index name the copies.

    Raises:
        As `compact`.
    """
    waiting: list[bytes] = []
    for entry in entries:
        waiting.append(cache.reader.content(entry.at, entry.key))
        if sum(map(len, waiting)) >= _COPY_BYTES:
            cache.write_again(waiting)
            waiting = []
    cache.write_again(waiting)


def delete_shard(cache: LocalCache, path: Path) -> None:
    """Forget a shard and delete its file.

    Raises:
        StorageError: the file system refused.
    """
    with cache.index.transaction():
        cache.index.remove_shard(path.stem)
    try:
        path.unlink()
        fsync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"could not delete {path}: {error.strerror}; {remedy_of(error)}") from error


@contextmanager
def owned_shards(cache: LocalCache, paths: Iterable[Path]) -> Iterator[set[Path]]:
    """Hold the locks of open shards; yields those that nobody else writes."""
    ends = cache.index.ends()
    owners = {path: ShardWriter.resume(path, end=ends.get(path.stem, SHARD_HEADER_BYTES)) for path in paths}
    for path, owner in owners.items():
        if owner is None:
            log.warning("shard left as it is, another process writes it", shard=str(path))
    try:
        yield {path for path, owner in owners.items() if owner}
    finally:
        for owner in owners.values():
            if owner:
                owner.close()


def _is_wasteful(cache: LocalCache, path: Path) -> bool:
    return _dead_bytes(cache, path) > 0 or path.stat().st_size < cache.shard_bytes // 2


def _dead_bytes(cache: LocalCache, path: Path) -> int:
    end = cache.index.ends().get(path.stem, SHARD_HEADER_BYTES)
    return end - SHARD_HEADER_BYTES - sum(entry.at.length for entry in cache.index.entries(path.stem))


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
