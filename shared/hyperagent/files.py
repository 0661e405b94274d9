"""Durable writes: a reader sees the old file, the new file, and nothing between.

The order is PostgreSQL's `durable_rename`: write to a temporary sibling, fsync the file, rename, fsync the directory
(https://github.com/postgres/postgres/blob/master/src/backend/storage/file/fd.c). A write that fails
leaves no trace of itself and is reported as one `StorageError`.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hyperagent.errors import StorageError

# Version 2 of the cache's format has every reader skip names that begin so (docs/cache-format.md).
_TEMPORARY_PREFIX = ".aside-"
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EFBIG: "the file is larger than the limit set for this process; raise it (ulimit -f) and run again",
    errno.EIO: "the disk fails; see the system's log, and choose another one",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n) and run again",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.ENOTDIR: "a file is where a folder should be; choose another name",
}


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that it is there whole, and durably, or not at all.

    Raises:
        StorageError: the file system refused; `path` is as it was before.
    """
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_once(path: Path, content: bytes) -> bool:
    """Write `content` to `path` unless something is there; of several writers at once exactly one succeeds.

    Returns:
        Whether it was this call that wrote it.

    Raises:
        StorageError: the file system refused.
    """
    temporary = temporary_sibling(path)
    with _no_trace(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        _fsync(temporary)
        try:
            # link(2) refuses a name that is taken, where rename(2) replaces it.
            os.link(temporary, path)
        except FileExistsError:
            return False
        fsync_directory(path.parent)
        return True


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write; on a clean exit it becomes `path`, whole, replacing what stood there.

    Raises:
        StorageError: the file system refused; `path` is as it was before.
    """
    temporary = temporary_sibling(path)
    with _no_trace(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        fsync_directory(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; on a clean exit it becomes `path`, whole, replacing what stood there.

    Raises:
        StorageError: the file system refused; `path` is as it was before.
    """
    temporary = temporary_sibling(path)
    with _no_trace(path, temporary):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _fsync(file)
        _fsync(temporary)
        if path.exists():
            # rename(2) cannot replace a directory that is not empty.
            retired = temporary_sibling(path)
            path.rename(retired)
            temporary.rename(path)
            shutil.rmtree(retired)
        else:
            temporary.rename(path)
        fsync_directory(path.parent)


def remove_directory(path: Path) -> None:
    """Remove a folder with all in it; its name is gone at once, so that nobody takes a part of it for the whole.

    Raises:
        StorageError: the file system refused.
    """
    temporary = temporary_sibling(path)
    with _no_trace(path, temporary):
        path.rename(temporary)
        fsync_directory(path.parent)
        shutil.rmtree(temporary)


def fsync_directory(path: Path) -> None:
    """Make renames and unlinks inside `path` durable."""
    _fsync(path)


def remedy_of(error: OSError) -> str:
    """What a user can do about a write that failed."""
    return _REMEDIES.get(error.errno or 0, "see the system's message")


def temporary_sibling(path: Path) -> Path:
    """Return a new name in the folder of `path`, to write under before the rename to `path`; nothing is created."""
    return path.parent / f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}"


def is_temporary(path: Path) -> bool:
    """Return whether `path` is a write in progress, or what a killed process left of one."""
    return path.name.startswith(_TEMPORARY_PREFIX)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _no_trace(path: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"could not write {path}: {error.strerror or error}; {remedy_of(error)}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            # Where nothing could be written there may be nothing to remove, not even a folder.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
