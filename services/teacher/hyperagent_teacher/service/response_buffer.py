"""Buffer an answer's messages on disk between the engine and a reader who may be slow.

Messages wait on disk, in an unnamed file that is gone when the process ends: the engine never waits for a reader, and
a reader that does not read costs no memory. There is one writer and one reader, both on the event loop.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self

from hyperagent.errors import StorageError


class ResponseBuffer:
    """First in, first out, unbounded; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Open a file in `folder`, which must exist.

        Raises:
            StorageError: the file system refuses.
        """
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # closed by __exit__
        except OSError as error:
            raise _refused(folder, error) from error
        self._folder = folder
        self._waiting: deque[tuple[int, int]] = deque()
        """Offset and length of each unread message."""
        self._end = 0
        self._is_finished = False
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    async def put(self, message: bytes) -> None:
        """Append a message.

        Raises:
            StorageError: the file system refuses.
        """
        try:
            await asyncio.to_thread(_write_all, self._file.fileno(), message, self._end)
        except OSError as error:
            raise _refused(self._folder, error) from error
        self._waiting.append((self._end, len(message)))
        self._end += len(message)
        self._changed.set()

    def finish(self, failure: BaseException | None = None) -> None:
        """Mark the end of the messages; `failure`, if given, is raised in the reader after the last one."""
        self._is_finished, self._failure = True, failure
        self._changed.set()

    async def messages(self) -> AsyncIterator[bytes]:
        """Yield every message in order, as it becomes available."""
        while True:
            while self._waiting:
                offset, length = self._waiting.popleft()
                yield await asyncio.to_thread(os.pread, self._file.fileno(), length, offset)
            if self._is_finished:
                break
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _refused(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"could not buffer rows in {folder}: {error.strerror}; free some disk space there")
