"""Reading records from memory-mapped shards; each record is checked on its first read."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

from hyperagent.cache.format.record import Header, check_record
from hyperagent.cache.format.shard import Location, locate
from hyperagent.errors import CorruptRecord, NotFound, StorageError


class ShardReader:
    """Read records of one folder of shards; thread-safe.

    A record's first read checks every byte and uses read(2), which reports a bad disk as an error, whereas a mapping
    would kill the process; later reads are views of the mapping and cost almost nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Remember the folder; files are opened when they are first needed."""
        self._folder = folder
        self._lock = threading.Lock()
        self._shards: dict[str, _MappedShard] = {}

    def read(self, at: Location, key: bytes) -> tuple[Header, memoryview]:
        """Return the header and bytes of a whole record; the bytes are a view that outlives deletion of the shard.

        Raises:
            NotFound: the shard does not exist any more.
            CorruptRecord: there is no intact record of `key`; the message says how it differs and how to restore it.
            StorageError: a file operation failed.
        """
        shard = self._shard(at.shard)
        try:
            if at.offset not in shard.checked:
                self._check(shard, at, key)
            content = shard.view(at)
            return Header.from_bytes(content), content
        except CorruptRecord as error:
            raise CorruptRecord(
                f"record {key.hex()} in {shard.path} at byte {at.offset} is damaged: {error}; run "
                "`hyperagent cache populate` again to restore it"
            ) from error
        except OSError as error:
            raise StorageError(
                f"could not read {shard.path}: {error.strerror}; check the disk and the file's permissions"
            ) from error

    def content(self, at: Location, key: bytes) -> bytes:
        """Return a whole record's bytes, read from disk and checked.

        Raises:
            As `read`.
        """
        self.forget(at)
        self.read(at, key)
        return bytes(self._shard(at.shard).view(at))

    def forget(self, at: Location) -> None:
        """Discard the result of a record's check, so that its next read checks it again."""
        with self._lock:
            if shard := self._shards.get(at.shard):
                shard.checked.discard(at.offset)

    def close(self) -> None:
        """Close all files; existing views stay readable."""
        with self._lock:
            for shard in self._shards.values():
                os.close(shard.descriptor)
            self._shards.clear()

    def _check(self, shard: _MappedShard, at: Location, key: bytes) -> None:
        content = os.pread(shard.descriptor, at.length, at.offset)
        if len(content) != at.length:
            raise CorruptRecord(f"the shard ends {at.length - len(content)} bytes before the record does")
        header, _ = check_record(memoryview(content))
        if header.key != key:
            raise CorruptRecord(f"it is the record of another key, {header.key.hex()}")
        with self._lock:
            shard.checked.add(at.offset)

    def _shard(self, name: str) -> _MappedShard:
        with self._lock:
            if name not in self._shards:
                try:
                    path = locate(self._folder, name)
                    self._shards[name] = _MappedShard(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                except FileNotFoundError:
                    raise NotFound(f"the cache in {self._folder.parent} has no shard {name}") from None
                except OSError as error:
                    raise StorageError(
                        f"could not open shard {name} in {self._folder}: {error.strerror}; check the disk, the file's "
                        "permissions and the limit of open files (ulimit -n)"
                    ) from error
            return self._shards[name]


class _MappedShard:
    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.checked: set[int] = set()
        """Offsets of records whose bytes have been checked."""
        self._mapping: mmap.mmap | None = None

    def view(self, at: Location) -> memoryview:
        """Return the bytes of a record that has been read before and therefore lies within the file."""
        end = at.offset + at.length
        mapping = self._mapping
        if mapping is None or len(mapping) < end:
            # An open shard has grown since; existing views keep the old mapping alive.
            mapping = self._mapping = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        return memoryview(mapping)[at.offset : end]
