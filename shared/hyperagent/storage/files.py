"""Write files and directories durably and atomically: a reader sees either the old content or the new one.

The order of operations is that of PostgreSQL's `durable_rename`: write a temporary file, fsync it, rename it, fsync the
directory (https://github.com/postgres/postgres/blob/master/src/backend/storage/file/fd.c). A write that fails leaves no
files behind and raises a `StorageError`.
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
_TEMPORARY_PREFIX = ".partial-"
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EFBIG: "the file is larger than the limit set for this process; raise it (ulimit -f) and run again",
    errno.EIO: "the disk failed; see the system's log, and choose another disk",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n) and run again",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.ENOTDIR: "a file is where a folder should be; choose another name",
}


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically and durably.

    Raises:
        StorageError: a file system operation failed; `path` is unchanged.
    """
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_once(path: Path, content: bytes) -> bool:
    """Write `content` to `path` unless the path exists; exactly one of several concurrent writers succeeds.

    Returns:
        Whether this call wrote the file.

    Raises:
        StorageError: a file system operation failed.
    """
    temporary = temporary_sibling(path)
    with _no_trace(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        _fsync(temporary)
        try:
            # link(2) fails if the name exists; rename(2) would replace it.
            os.link(temporary, path)
        except FileExistsError:
            return False
        fsync_directory(path.parent)
        return True


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file to write; on a clean exit it atomically replaces `path`.

    Raises:
        StorageError: a file system operation failed; `path` is unchanged.
    """
    temporary = temporary_sibling(path)
    with _no_trace(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        fsync_directory(path.parent)


@contextmanager
def new_directory(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary folder to fill; on a clean exit it becomes `path`, replacing a folder that existed there.

    Args:
        durable: whether the folder must survive a loss of power; without it only a killed process.

    Raises:
        StorageError: a file system operation failed; `path` is unchanged.
    """
    temporary = temporary_sibling(path)
    with _no_trace(path, temporary):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        temporary.mkdir(parents=True)
        yield temporary
        if durable:
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
        if durable:
            fsync_directory(path.parent)


def remove_directory(path: Path) -> None:
    """Remove a folder and its contents; it is renamed first, so no reader sees a partly removed folder.

    Raises:
        StorageError: a file system operation failed.
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
    """Return what a user can do about a failed write."""
    return _REMEDIES.get(error.errno or 0, "see the system's message")


def temporary_sibling(path: Path) -> Path:
    """Return a new name in the folder of `path`, to write under before the rename to `path`; nothing is created."""
    return path.parent / f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}"


def is_temporary(path: Path) -> bool:
    """Return whether `path` is a temporary file of a write in progress, or one left by a killed process."""
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
            # If the write failed, neither the file nor its folder may exist.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
