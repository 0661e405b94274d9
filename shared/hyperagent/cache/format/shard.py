"""Shards: append-only files of records. docs/cache-format.md specifies every byte.

    header   magic, the teacher's fingerprint, checksum
    records  one after the other, each beginning at a multiple of `ALIGNMENT`
    footer   in a sealed shard: the location of each record, sorted by key; a digest of the whole shard

A shard that is being written ends in `.open` and is locked by its only writer; a sealed shard ends in `.shard` and
never changes again.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from blake3 import blake3
from numpy.typing import NDArray

from hyperagent.cache.format.record import ALIGNMENT, HEADER_BYTES, MAGIC, Header, check_record
from hyperagent.errors import CorruptRecord
from hyperagent.storage.file_lock import try_lock
from hyperagent.storage.files import fsync_directory, is_temporary, temporary_sibling

_MAGIC = b"HATKSHD2"
_HEADER = struct.Struct("<8s32s16x")
SHARD_HEADER_BYTES = _HEADER.size + 8
_FOOTER_ENTRY = np.dtype([("key", "V32"), ("offset", "<u8"), ("length", "<u4"), ("kind", "<u4")])
_TRAILER = struct.Struct("<QQ8s32s8s")
"""Offset of the footer, number of entries, footer checksum, BLAKE3 of everything before the digest, magic."""
_END_MAGIC = b"HATKEND2"
OPEN, SEALED = ".open", ".shard"
_WINDOW_BYTES = 1 << 20


@dataclass(frozen=True)
class Location:
    """Location of a record."""

    shard: str
    """The shard's file name without its suffix."""
    offset: int
    length: int


@dataclass(frozen=True)
class Found:
    """Result of a scan: a whole record, or a damaged region."""

    offset: int
    length: int
    header: Header | None
    """Header of the record; None if the header is damaged too."""
    damage: str = ""
    """Description of the damage; empty for a whole record."""


class ShardWriter:
    """The only writer of an open shard; the operating system releases its lock when the process ends."""

    def __init__(self, path: Path, descriptor: int, end: int) -> None:
        """Initialize from an open descriptor; use `create` or `resume` instead."""
        self.path = path
        self.name = path.stem
        self.end = end
        """Offset of the next record."""
        self._descriptor = descriptor

    @classmethod
    def create(cls, folder: Path, fingerprint: str) -> ShardWriter:
        """Create an empty, durable shard.

        Raises:
            OSError: a file operation failed; nothing remains on disk.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}{OPEN}"
        # The file is renamed after the header is written, so that a shard always has one.
        temporary = temporary_sibling(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        writer = cls(path, descriptor, 0)
        try:
            # The name is new, so nobody else can hold the lock.
            try_lock(descriptor, exclusive=True)
            fields = _HEADER.pack(_MAGIC, bytes.fromhex(fingerprint))
            writer.append(fields + xxhash.xxh3_64_digest(fields))
            writer.sync()
            temporary.rename(path)
            fsync_directory(folder)
        except BaseException:
            for left in (temporary, path):
                with suppress(OSError):
                    left.unlink()
            writer.close()
            raise
        return writer

    @classmethod
    def resume(cls, path: Path, *, end: int) -> ShardWriter | None:
        """Resume an abandoned open shard, truncated at `end`; return None if another process writes it or it is gone.

        Raises:
            OSError: a file operation failed.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # Its writer may have sealed and renamed it after it was opened here and before it was locked.
            if (
                try_lock(descriptor, exclusive=True)
                and path.exists()
                and os.fstat(descriptor).st_ino == path.stat().st_ino
                and os.fstat(descriptor).st_size >= end
            ):
                os.ftruncate(descriptor, end)
                return cls(path, descriptor, end)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def append(self, content: bytes) -> int:
        """Append a record and return its offset; it is durable once `sync` has returned.

        Raises:
            OSError: writing failed; call `cut` before anything else.
        """
        offset = self.end
        view = memoryview(content)
        written = 0
        while written < len(view):
            written += os.pwrite(self._descriptor, view[written:], offset + written)
        self.end = offset + len(view)
        return offset

    def sync(self) -> None:
        """Flush everything to disk.

        Raises:
            OSError: data was lost and retrying cannot help (https://wiki.postgresql.org/wiki/Fsync_Errors): close this writer.
        """
        os.fsync(self._descriptor)

    def cut(self, end: int) -> None:
        """Remove everything that was appended after `end`.

        Raises:
            OSError: a file operation failed.
        """
        os.ftruncate(self._descriptor, end)
        self.end = end

    def seal(self) -> None:
        """Write the footer, give the shard its final name, and close it.

        Raises:
            OSError: a file operation failed; the records remain readable.
        """
        entries = sorted(
            (found.header.key, found.offset, found.length, int(found.header.kind))
            for found in scan(self.path, start=SHARD_HEADER_BYTES, end=self.end)
            if found.header is not None and not found.damage
        )
        footer = np.array(entries, _FOOTER_ENTRY).tobytes()
        footer_at, records_end = self.end, self.end
        try:
            self.append(footer + struct.pack("<QQ8s", footer_at, len(entries), xxhash.xxh3_64_digest(footer)))
            digest = digest_of(self.path, self.end)
            self.append(digest + _END_MAGIC)
            self.sync()
            self.path.rename(self.path.with_suffix(SEALED))
            fsync_directory(self.path.parent)
        except OSError:
            if self.path.exists():
                with suppress(OSError):
                    self.cut(records_end)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Close the shard and release its lock; the next writer continues it."""
        os.close(self._descriptor)


def locate(folder: Path, name: str) -> Path:
    """Return the path of a shard, open or sealed.

    Raises:
        FileNotFoundError: there is no such shard.
    """
    # In this order, a shard that is sealed between the two checks is found by the second.
    for suffix in (OPEN, SEALED):
        path = folder / f"{name}{suffix}"
        if path.exists():
            return path
    raise FileNotFoundError(f"there is no shard {name}")


def shard_paths(folder: Path) -> list[Path]:
    """Return the paths of all shards, sorted by name."""
    return sorted(path for path in folder.glob("*") if path.suffix in (OPEN, SEALED) and not is_temporary(path))


def fingerprint_of(path: Path) -> str:
    """Read the fingerprint (hex) of the teacher from a shard's header.

    Raises:
        CorruptRecord: the header is not that of a shard.
    """
    with path.open("rb") as file:
        content = file.read(SHARD_HEADER_BYTES)
    if len(content) < SHARD_HEADER_BYTES or content[:8] != _MAGIC:
        raise CorruptRecord("it does not begin like a shard")
    if xxhash.xxh3_64_digest(content[: _HEADER.size]) != content[_HEADER.size :]:
        raise CorruptRecord("its header's checksum does not match")
    return str(_HEADER.unpack_from(content)[1].hex())


def read_footer(path: Path) -> tuple[NDArray[np.void], int]:
    """Read the footer of a sealed shard's file; see `parse_footer`.

    Raises:
        CorruptRecord: the file has no valid footer.
    """
    size = path.stat().st_size
    with path.open("rb") as file:

        def read(start: int, end: int) -> bytes:
            file.seek(start)
            return file.read(end - start)

        return parse_footer(read, size)


def parse_footer(read: Callable[[int, int], bytes], size: int) -> tuple[NDArray[np.void], int]:
    """Return the entries of a sealed shard's footer, sorted by key, and the end offset of its records.

    Args:
        read: returns the shard's bytes between two offsets.

    Raises:
        CorruptRecord: the shard has no valid footer.
    """
    if size < SHARD_HEADER_BYTES + _TRAILER.size:
        raise CorruptRecord(f"it has {size} bytes, fewer than a header and a footer")
    footer_at, count, checksum, _, magic = _TRAILER.unpack(read(size - _TRAILER.size, size))
    if magic != _END_MAGIC or footer_at + count * _FOOTER_ENTRY.itemsize + _TRAILER.size != size:
        raise CorruptRecord("it does not end with a footer")
    footer = read(footer_at, size - _TRAILER.size)
    if xxhash.xxh3_64_digest(footer) != checksum:
        raise CorruptRecord("its footer's checksum does not match")
    return np.frombuffer(footer, _FOOTER_ENTRY), footer_at


def check_seal(path: Path) -> None:
    """Check every byte of a sealed shard against its digest.

    Raises:
        CorruptRecord: a byte has changed.
    """
    read_footer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - 40)
        stored = file.read(32)
    if digest_of(path, size - 40) != stored:
        raise CorruptRecord("its digest does not match")


def digest_of(path: Path, end: int) -> bytes:
    """Return the BLAKE3 hash of a file's first `end` bytes."""
    digest = blake3()
    with path.open("rb") as file:
        while end > 0 and (part := file.read(min(end, 1 << 20))):
            digest.update(part)
            end -= len(part)
    return digest.digest()


def scan(path: Path, *, start: int, end: int) -> Iterator[Found]:
    """Yield every record and every damaged region between two offsets; every byte is read.

    After damage, the scan continues at the next valid header, so no later record is lost.
    """
    with path.open("rb") as file:
        while start < end:
            found = _record_at(file.fileno(), start, end)
            yield found
            start += found.length


def _record_at(descriptor: int, start: int, end: int) -> Found:
    header = None
    try:
        header = Header.from_bytes(memoryview(os.pread(descriptor, HEADER_BYTES, start)))
        if start + header.record_bytes > end:
            raise CorruptRecord(f"{end - start} of its {header.record_bytes} bytes are present")
        check_record(memoryview(os.pread(descriptor, header.record_bytes, start)))
    except CorruptRecord as error:
        if header is not None and start + header.record_bytes <= end:
            return Found(start, header.record_bytes, header, str(error))
        return Found(start, _next_header(descriptor, start + ALIGNMENT, end) - start, None, str(error))
    return Found(start, header.record_bytes, header)


def _next_header(descriptor: int, start: int, end: int) -> int:
    """Return the offset of the first valid header at or after `start`, or `end` if there is none."""
    while start < end:
        window = os.pread(descriptor, _WINDOW_BYTES, start)
        for offset in range(0, len(window), ALIGNMENT):
            if window[offset : offset + len(MAGIC)] != MAGIC:
                continue
            with suppress(CorruptRecord):
                Header.from_bytes(memoryview(os.pread(descriptor, HEADER_BYTES, start + offset)))
                return min(start + offset, end)
        start += _WINDOW_BYTES
    return end
