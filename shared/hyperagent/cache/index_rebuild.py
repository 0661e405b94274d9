"""The index of a cache: opened, or made again from the shards where it is missing or damaged."""

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
    """The index of the cache in `root`, made again from its shards if need be.

    Raises:
        StorageError: the file system refused.
    """
    path = index_path(root)
    with suppress(CorruptRecord):
        if path.exists():
            return Index.open(path)
    try:
        with locked(root / "index.lock", exclusive=True, wait_s=_LOCK_S):
            # Somebody else may have made it while this process waited.
            if path.exists():
                try:
                    return Index.open(path)
                except CorruptRecord as error:
                    log.warning("damaged index is made again", path=str(path), reason=str(error))
            rebuild_index(root, fingerprint)
            return Index.open(path)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"could not make {path}: {error.strerror or error}; {remedy_of(error)}") from error


def rebuild_index(root: Path, fingerprint: str, progress: Progress = no_progress) -> None:
    """Make the index from the shards and put it in its place; hold `index.lock`, and have no writer.

    Of two whole records with one key the first counts, in the order of the shards' names.

    Raises:
        OSError: the file system refused; the index is as it was.
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
    """Where a cache's index stands."""
    return root / "index.sqlite"


def _entries_of(path: Path, fingerprint: str) -> tuple[list[Entry], int]:
    """The records of a shard and where they end; a damaged part is passed over, and `hyperagent cache verify` names it."""
    try:
        if fingerprint_of(path) != fingerprint:
            raise CorruptRecord("it is of another teacher")
    except CorruptRecord as error:
        log.warning("shard passed over", shard=str(path), reason=str(error))
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
    # A torn tail is not part of the shard; its next writer cuts it off.
    end = max((one.offset + one.length for one in found if not one.damage), default=SHARD_HEADER_BYTES)
    return entries, end


def _remove_index(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            Path(f"{path}{suffix}").unlink()
