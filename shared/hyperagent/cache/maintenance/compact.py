"""Compaction and garbage collection: live records are copied into new shards, and the old files are deleted.

Compaction may be killed at any moment: copies are durable before the index points to them, and old files are deleted
last. Other processes may read meanwhile; a reader that misses a shard looks its record up in the index again.
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
    """Result of compaction."""

    shards_before: int
    shards_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class CollectReport:
    """Result of garbage collection."""

    trajectories_removed: int
    blocks_removed: int
    leftovers_removed: int
    compacted: CompactReport


def compact(cache: LocalCache, progress: Progress = no_progress) -> CompactReport:
    """Rewrite shards that hold dead bytes or are small, and seal the new shards.

    Raises:
        CorruptRecord: a live record is damaged; nothing is lost, and `repair` quarantines its shard.
        StorageError: a file operation failed; shards compacted before remain compacted.
    """
    cache.release_shard()
    before = shard_paths(cache.shards)
    bytes_before = _size(before)
    # The locks keep every process, including this one, from appending to shards that are about to be deleted.
    with owned_shards(cache, [path for path in before if path.suffix == OPEN]) as owned:
        wasteful = [path for path in before if path in owned or (path.suffix == SEALED and _is_wasteful(cache, path))]
        # A single small shard without dead bytes would only be copied.
        if len(wasteful) > 1 or any(path in owned or _dead_bytes(cache, path) for path in wasteful):
            for done, path in enumerate(wasteful):
                progress(done, len(wasteful))
                copy_records(cache, cache.index.entries(path.stem))
                delete_shard(cache, path)
            cache.seal()
    after = shard_paths(cache.shards)
    return CompactReport(len(before), len(after), bytes_before, _size(after))


def collect_garbage(cache: LocalCache, keep: Iterable[str] | None, progress: Progress = no_progress) -> CollectReport:
    """Remove trajectories that are not in `keep`, blocks that no trajectory needs, and leftovers of killed writers.

    Args:
        cache: opened with `exclusive`, so that no other process reads removed records.
        keep: keys of the trajectories to keep; None keeps all.

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
    """Copy records into the shard that is being written and make the index point to the copies.

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
    """Remove a shard from the index and delete its file.

    Raises:
        StorageError: a file operation failed.
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
    """Lock the open shards and yield those that no other process writes."""
    ends = cache.index.ends()
    owners = {path: ShardWriter.resume(path, end=ends.get(path.stem, SHARD_HEADER_BYTES)) for path in paths}
    for path, owner in owners.items():
        if owner is None:
            log.warning("shard skipped because another process writes it", shard=str(path))
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
