"""Who reads a cache: a lock that readers share, and that removing takes for itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyperagent.errors import Conflict, StorageError


def hold(path: Path, *, exclusive: bool) -> int:
    """Take the lock at `path`, beside other readers or alone, until the descriptor that is returned is closed.

    Raises:
        Conflict: somebody holds it otherwise.
        StorageError: the file system refused.
    """
    if exclusive:
        return _hold(path, fcntl.LOCK_EX, "somebody has it open; stop trainers and teachers that use it first")
    return _hold(path, fcntl.LOCK_SH, "something is being removed from it; wait for that to end")


@contextmanager
def held_exclusively(path: Path) -> Iterator[None]:
    """Hold the lock at `path` against all readers.

    Raises:
        Conflict: somebody reads.
        StorageError: the file system refused.
    """
    descriptor = hold(path, exclusive=True)
    try:
        yield
    finally:
        os.close(descriptor)


def _hold(path: Path, mode: int, reason: str) -> int:
    try:
        try:
            # A file system that is read-only has the file already.
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
    except BlockingIOError:
        raise Conflict(f"the cache in {path.parent} is in use: {reason}") from None
    except OSError as error:
        raise StorageError(f"could not lock {path}: {error.strerror}; see the folder's permissions") from error
    return descriptor
