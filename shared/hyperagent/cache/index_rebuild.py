"""Open the index of a cache, or rebuild it from the shards if it is missing or damaged."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import structlog

from hyperagent.cache.format.record import Kind
from hyperagent.cache.format.shard import (
    SEALED,
    SHARD_HEADER_BYTES,
    Location,
    fingerprint_of,
    read_footer,
    scan,
    shard_paths,
)
from hyperagent.cache.index import Entry, Index
from hyperagent.errors import CorruptRecord, StorageError
from hyperagent.progress import Progress, no_progress
from hyperagent.storage.file_lock import locked
from hyperagent.storage.files import fsync_directory, remedy_of, temporary_sibling

_LOCK_S = 600.0
log = structlog.get_logger()


def open_index(root: Path, fingerprint: str) -> Index:
    """Open the index of the cache in `root`; rebuild it from the shards if it is missing or damaged.

    Raises:
        StorageError: a file operation failed.
    """
    path = index_path(root)
    with suppress(CorruptRecord):
        if path.exists():
            return Index.open(path)
    try:
        with locked(root / "index.lock", exclusive=True, wait_s=_LOCK_S):
            # Another process may have rebuilt it while this one waited.
            if path.exists():
                try:
                    return Index.open(path)
                except CorruptRecord as error:
                    log.warning("rebuilding damaged index", path=str(path), reason=str(error))
            rebuild_index(root, fingerprint)
            return Index.open(path)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"could not rebuild {path}: {error.strerror or error}; {remedy_of(error)}") from error


def rebuild_index(root: Path, fingerprint: str, progress: Progress = no_progress) -> None:
    """Rebuild the index from the shards; the caller holds `index.lock` and ensures that there is no writer.

    If two valid records have the same key, the first in the order of shard names is used.

    Raises:
        OSError: a file operation failed; the index is unchanged.
    """
    path = index_path(root)
    temporary = temporary_sibling(path)
    try:
        index = Index.create(temporary)
        paths = shard_paths(root / "shards")
        for done, shard in enumerate(paths):
            progress(done, len(paths))
            entries, end = _entries_of(shard, fingerprint)
            with index.transaction():
                index.add(entries)
                index.set_end(shard.stem, end)
        index.close()
        _remove_index(path)
        temporary.replace(path)
        fsync_directory(root)
    finally:
        _remove_index(temporary)


def index_path(root: Path) -> Path:
    """Return the path of a cache's index."""
    return root / "index.sqlite"


def _entries_of(path: Path, fingerprint: str) -> tuple[list[Entry], int]:
    """Return a shard's records and their end offset; damage is skipped and left to `hyperagent cache verify`."""
    try:
        if fingerprint_of(path) != fingerprint:
            raise CorruptRecord("it belongs to another teacher")
    except CorruptRecord as error:
        log.warning("shard skipped", shard=str(path), reason=str(error))
        return [], SHARD_HEADER_BYTES
    if path.suffix == SEALED:
        with suppress(CorruptRecord):
            footer, end = read_footer(path)
            return [
                Entry(
                    bytes(row["key"]),
                    Kind(int(row["kind"])),
                    Location(path.stem, int(row["offset"]), int(row["length"])),
                )
                for row in footer
            ], end
    found = list(scan(path, start=SHARD_HEADER_BYTES, end=path.stat().st_size))
    entries = [
        Entry(one.header.key, one.header.kind, Location(path.stem, one.offset, one.length))
        for one in found
        if one.header is not None and not one.damage
    ]
    # A torn tail is not part of the shard; its next writer truncates it.
    end = max((one.offset + one.length for one in found if not one.damage), default=SHARD_HEADER_BYTES)
    return entries, end


def _remove_index(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            Path(f"{path}{suffix}").unlink()
