"""Reader lock of a cache: shared by every process that has the cache open, exclusive for removing records."""

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
        Conflict: the cache is open elsewhere (for an exclusive lock), or records are being removed (for a shared one).
        StorageError: a file operation failed.
    """
    try:
        return open_locked(path, exclusive=exclusive)
    except BlockingIOError:
        reason = (
            "another process has it open; first stop the trainers and teachers that use it"
            if exclusive
            else "another process is removing records from it; wait until it has finished"
        )
        raise Conflict(f"the cache in {path.parent} is in use: {reason}") from None
    except OSError as error:
        raise StorageError(f"could not lock {path}: {error.strerror}; check the folder's permissions") from error


@contextmanager
def held_exclusively(path: Path) -> Iterator[None]:
    """Hold the exclusive lock at `path`, which keeps all readers out.

    Raises:
        As `hold`.
    """
    descriptor = hold(path, exclusive=True)
    try:
        yield
    finally:
        os.close(descriptor)
