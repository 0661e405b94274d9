"""Writing records to shards: append, sync, and only then add to the index."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from hyperagent.cache.format.record import Header
from hyperagent.cache.format.shard import OPEN, SHARD_HEADER_BYTES, Location, ShardWriter, fingerprint_of, shard_paths
from hyperagent.cache.index import Entry, Index
from hyperagent.cache.shard_reader import ShardReader
from hyperagent.errors import CorruptRecord, NotFound, StorageError
from hyperagent.storage.files import remedy_of

log = structlog.get_logger()

SHARD_BYTES = 1 << 30
"""Size in bytes from which a shard is sealed."""


class RecordWriter:
    """Write records of one cache; safe for threads and concurrent processes."""

    def __init__(self, folder: Path, fingerprint: str, index: Index, reader: ShardReader, *, shard_bytes: int) -> None:
        """Remember the parts; a shard is opened on the first write."""
        self._folder = folder
        self._fingerprint = fingerprint
        self._index = index
        self._reader = reader
        self._shard_bytes = shard_bytes
        self._lock = threading.Lock()
        self._shard: ShardWriter | None = None

    def write(self, records: Sequence[bytes], *, again: bool = False) -> None:
        """Store all records durably; a record whose key exists and is intact is not written again.

        Args:
            again: rewrite existing records too and make the index point to the new copies.

        Raises:
            StorageError: a file operation failed; no record has been added.
        """
        with self._lock, self._storage_errors():
            cut_at: int | None = None
            try:
                # The index's write lock is held meanwhile, so no other process can store the same record.
                with self._index.transaction():
                    missing = [record for record in records if again or not self._is_there(record)]
                    if not missing:
                        return
                    shard = self._open_shard()
                    cut_at = shard.end
                    entries = [_entry(shard, record) for record in missing]
                    shard.sync()
                    self._index.put(entries)
                    self._index.set_end(shard.name, shard.end)
                    # From here on the index may list the records even if its commit reports an error, so they must be kept.
                    cut_at = None
            except BaseException:
                self._give_up(cut_at)
                raise
            if shard.end >= self._shard_bytes:
                self._seal()

    def close(self) -> None:
        """Close the shard and release its lock; the next writer continues it."""
        with self._lock:
            if self._shard:
                self._shard.close()
                self._shard = None

    def seal(self) -> None:
        """Seal the shard that is being written, full or not."""
        with self._lock:
            self._seal()

    def _is_there(self, record: bytes) -> bool:
        key = Header.from_bytes(memoryview(record)).key
        at = self._index.find(key)
        if at is None:
            return False
        try:
            self._reader.content(at, key)
        except (CorruptRecord, NotFound) as error:
            log.warning("rewriting damaged record", key=key.hex(), reason=str(error))
            return False
        return True

    def _open_shard(self) -> ShardWriter:
        """Return the shard to append to: this writer's, an abandoned one, or a new one."""
        if self._shard is None:
            ends = self._index.ends()
            for path in shard_paths(self._folder):
                if path.suffix != OPEN:
                    continue
                # The writer of a shard that the index does not list was killed before its first record; only its header is valid.
                end = ends.get(path.stem, SHARD_HEADER_BYTES)
                with suppress(CorruptRecord):
                    if fingerprint_of(path) == self._fingerprint and (shard := ShardWriter.resume(path, end=end)):
                        self._shard = shard
                        break
            else:
                self._shard = ShardWriter.create(self._folder, self._fingerprint)
        return self._shard

    def _give_up(self, cut_at: int | None) -> None:
        """Truncate bytes that did not become durable, and never write through this descriptor again.

        After a failed fsync, the system may have dropped the unwritten pages, and it reports the error only once.
        """
        shard, self._shard = self._shard, None
        if shard:
            # If truncating fails now, the next writer does it: the index has the shard's end offset.
            if cut_at is not None:
                with suppress(OSError):
                    shard.cut(cut_at)
            shard.close()

    def _seal(self) -> None:
        shard, self._shard = self._shard, None
        if shard:
            try:
                shard.seal()
            except OSError as error:
                # The records are durable without a seal; the next writer continues the shard and tries again.
                log.warning("shard not sealed", shard=str(shard.path), error=str(error))

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"could not write the cache's records in {self._folder}: {error.strerror or error}; {remedy_of(error)}"
            ) from error


def _entry(shard: ShardWriter, record: bytes) -> Entry:
    header = Header.from_bytes(memoryview(record))
    return Entry(header.key, header.kind, Location(shard.name, shard.append(record), len(record)))
