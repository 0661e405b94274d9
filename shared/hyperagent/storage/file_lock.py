"""Take advisory locks (flock(2)) on files and folders; a lock ends with its descriptor, at the latest with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.05


def try_lock(descriptor: int, *, exclusive: bool) -> bool:
    """Lock an open file, shared or exclusively, and return whether that succeeded; False if another holds it.

    Raises:
        OSError: the file system refuses.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_locked(path: Path, *, exclusive: bool, wait_s: float = 0.0) -> int:
    """Lock a folder or file, creating the file if it does not exist, until the returned descriptor is closed.

    Child processes do not inherit the descriptor.

    Raises:
        BlockingIOError: another process or descriptor still holds the lock after `wait_s` seconds.
        OSError: the file system refuses.
    """
    descriptor = _open(path)
    deadline = time.monotonic() + wait_s
    try:
        while not try_lock(descriptor, exclusive=exclusive):
            if time.monotonic() >= deadline:
                raise BlockingIOError(errno.EWOULDBLOCK, "another process holds its lock", str(path))
            time.sleep(_POLL_S)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(path: Path, *, exclusive: bool, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock, as taken by `open_locked`, inside the block.

    Raises:
        As `open_locked`.
    """
    descriptor = open_locked(path, exclusive=exclusive, wait_s=wait_s)
    try:
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    except OSError:
        # A folder cannot be opened with O_CREAT, nor can a file on a read-only file system.
        return os.open(path, os.O_RDONLY)
