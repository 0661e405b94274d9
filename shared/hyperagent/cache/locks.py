"""The lock of a cache's readers: shared by everyone who has the cache open, exclusive for whoever removes something."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyperagent.errors import Conflict, StorageError
from hyperagent.storage.file_lock import open_locked


def hold(path: Path, *, exclusive: bool) -> int:
    """Lock `path` until the returned descriptor is closed.

    Raises:
        Conflict: somebody reads, or, for a reader, somebody removes something.
        StorageError: the file system refused.
    """
    try:
        return open_locked(path, exclusive=exclusive)
    except BlockingIOError:
        reason = (
            "somebody has it open; stop trainers and teachers that use it first"
            if exclusive
            else "something is being removed from it; wait for that to end"
        )
        raise Conflict(f"the cache in {path.parent} is in use: {reason}") from None
    except OSError as error:
        raise StorageError(f"could not lock {path}: {error.strerror}; see the folder's permissions") from error


@contextmanager
def held_exclusively(path: Path) -> Iterator[None]:
    """Hold the lock at `path` against all readers.

    Raises:
        As `hold`.
    """
    descriptor = hold(path, exclusive=True)
    try:
        yield
    finally:
        os.close(descriptor)
