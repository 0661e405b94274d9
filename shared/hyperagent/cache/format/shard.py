"""Shards: the append-only files that records stand in. docs/cache-format.md specifies every byte.

    header   magic, the teacher's fingerprint, checksum
    records  one after the other, each beginning at a multiple of `ALIGNMENT`
    footer   of a sealed shard: where each record stands, sorted by key; a digest of the whole shard

A shard that is being written is named `.open` and locked by its one writer; a sealed one is named `.shard` and never
changes again.
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
"""Where the footer begins, its entries, its checksum, BLAKE3 of everything before the digest, magic."""
_END_MAGIC = b"HATKEND2"
OPEN, SEALED = ".open", ".shard"
_WINDOW_BYTES = 1 << 20


@dataclass(frozen=True)
class Location:
    """Where a record stands."""

    shard: str
    """The shard's file name without its suffix."""
    offset: int
    length: int


@dataclass(frozen=True)
class Found:
    """What a scan met: a whole record, or damage."""

    offset: int
    length: int
    header: Header | None
    """None where damage has taken the header too."""
    damage: str = ""
    """How the bytes differ from what was written; empty of a whole record."""


class ShardWriter:
    """The one writer of an open shard; the lock is the operating system's and ends with the process."""

    def __init__(self, path: Path, descriptor: int, end: int) -> None:
        """Use `create` or `resume`."""
        self.path = path
        self.name = path.stem
        self.end = end
        """Where the next record goes."""
        self._descriptor = descriptor

    @classmethod
    def create(cls, folder: Path, fingerprint: str) -> ShardWriter:
        """A new, empty, durable shard.

        Raises:
            OSError: the file system refused; nothing is left.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}{OPEN}"
        # The rename comes after the header, so that a shard always has one.
        temporary = temporary_sibling(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        writer = cls(path, descriptor, 0)
        try:
            # The name is new, so that nobody else can hold the lock.
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
        """An open shard that nobody writes any more, cut off at `end`; None if somebody does, or it is not there.

        Raises:
            OSError: the file system refused.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # Its writer may have sealed it, and so renamed it, between our opening it and our having the lock.
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
        """Write at the end; returns where that was. Durable once `sync` has returned.

        Raises:
            OSError: the file system refused; call `cut` before anything else.
        """
        offset = self.end
        view = memoryview(content)
        written = 0
        while written < len(view):
            written += os.pwrite(self._descriptor, view[written:], offset + written)
        self.end = offset + len(view)
        return offset

    def sync(self) -> None:
        """Make everything durable.

        Raises:
            OSError: it is not, and never will be (https://wiki.postgresql.org/wiki/Fsync_Errors): close this writer.
        """
        os.fsync(self._descriptor)

    def cut(self, end: int) -> None:
        """Take back what was appended behind `end`.

        Raises:
            OSError: the file system refused.
        """
        os.ftruncate(self._descriptor, end)
        self.end = end

    def seal(self) -> None:
        """Write the footer and give the shard its final name; then it is closed.

        Raises:
            OSError: the file system refused; the records are as readable as before.
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
        """Give the shard up; the next writer continues it."""
        os.close(self._descriptor)


def locate(folder: Path, name: str) -> Path:
    """The file of a shard, open or sealed.

    Raises:
        FileNotFoundError: there is none.
    """
    # In this order a shard that is sealed between the two looks is found by the second.
    for suffix in (OPEN, SEALED):
        path = folder / f"{name}{suffix}"
        if path.exists():
            return path
    raise FileNotFoundError(f"there is no shard {name}")


def shard_paths(folder: Path) -> list[Path]:
    """All shards, sorted by name."""
    return sorted(path for path in folder.glob("*") if path.suffix in (OPEN, SEALED) and not is_temporary(path))


def fingerprint_of(path: Path) -> str:
    """The teacher (hex) that a shard's header names.

    Raises:
        CorruptRecord: it is not a shard's header.
    """
    with path.open("rb") as file:
        content = file.read(SHARD_HEADER_BYTES)
    if len(content) < SHARD_HEADER_BYTES or content[:8] != _MAGIC:
        raise CorruptRecord("it does not begin like a shard")
    if xxhash.xxh3_64_digest(content[: _HEADER.size]) != content[_HEADER.size :]:
        raise CorruptRecord("its header's checksum does not fit")
    return str(_HEADER.unpack_from(content)[1].hex())


def read_footer(path: Path) -> tuple[NDArray[np.void], int]:
    """`parse_footer` of a sealed shard's file.

    Raises:
        CorruptRecord: there is no footer that fits the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:

        def read(start: int, end: int) -> bytes:
            file.seek(start)
            return file.read(end - start)

        return parse_footer(read, size)


def parse_footer(read: Callable[[int, int], bytes], size: int) -> tuple[NDArray[np.void], int]:
    """Entries of a sealed shard's footer, sorted by key, and where its records end.

    Args:
        read: the shard's bytes from one offset to before another.

    Raises:
        CorruptRecord: there is no footer that fits the shard.
    """
    if size < SHARD_HEADER_BYTES + _TRAILER.size:
        raise CorruptRecord(f"it has {size} bytes, fewer than a header and a footer")
    footer_at, count, checksum, _, magic = _TRAILER.unpack(read(size - _TRAILER.size, size))
    if magic != _END_MAGIC or footer_at + count * _FOOTER_ENTRY.itemsize + _TRAILER.size != size:
        raise CorruptRecord("it does not end with a footer")
    footer = read(footer_at, size - _TRAILER.size)
    if xxhash.xxh3_64_digest(footer) != checksum:
        raise CorruptRecord("its footer's checksum does not fit")
    return np.frombuffer(footer, _FOOTER_ENTRY), footer_at


def check_seal(path: Path) -> None:
    """Check every byte of a sealed shard against its digest.

    Raises:
        CorruptRecord: one has changed.
    """
    read_footer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - 40)
        stored = file.read(32)
    if digest_of(path, size - 40) != stored:
        raise CorruptRecord("its digest does not fit")


def digest_of(path: Path, end: int) -> bytes:
    """BLAKE3 of a file's first `end` bytes."""
    digest = blake3()
    with path.open("rb") as file:
        while end > 0 and (part := file.read(min(end, 1 << 20))):
            digest.update(part)
            end -= len(part)
    return digest.digest()


def scan(path: Path, *, start: int, end: int) -> Iterator[Found]:
    """Every record between two offsets and, between them, what is damaged; every byte is read.

    Behind damage the scan goes on at the next header that is whole, so nothing after it is lost.
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
            raise CorruptRecord(f"{end - start} of its {header.record_bytes} bytes are there")
        check_record(memoryview(os.pread(descriptor, header.record_bytes, start)))
    except CorruptRecord as error:
        if header is not None and start + header.record_bytes <= end:
            return Found(start, header.record_bytes, header, str(error))
        return Found(start, _next_header(descriptor, start + ALIGNMENT, end) - start, None, str(error))
    return Found(start, header.record_bytes, header)


def _next_header(descriptor: int, start: int, end: int) -> int:
    """Where the first whole header at or behind `start` begins, or `end`."""
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
