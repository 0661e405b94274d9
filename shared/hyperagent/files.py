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
    with new_file(path) as aside:
        aside.write_bytes(content)


def write_once(path: Path, content: bytes) -> bool:
    """Write `content` to `path` unless the path exists; exactly one of several concurrent writers succeeds.

    Returns:
        Whether this call wrote the file.

    Raises:
        StorageError: a file system operation failed.
    """
    aside = _aside(path)
    with _no_trace(path, aside):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        _fsync(aside)
        try:
            # link(2) fails if the name exists; rename(2) would replace it.
            os.link(aside, path)
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
    aside = _aside(path)
    with _no_trace(path, aside):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _fsync(aside)
        aside.replace(path)
        fsync_directory(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on a clean exit it becomes `path`, replacing a folder that existed there.

    Raises:
        StorageError: a file system operation failed; `path` is unchanged.
    """
    aside = _aside(path)
    with _no_trace(path, aside):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        aside.mkdir(parents=True)
        yield aside
        for file in aside.rglob("*"):
            _fsync(file)
        _fsync(aside)
        if path.exists():
            # rename(2) cannot replace a directory that is not empty.
            retired = _aside(path)
            path.rename(retired)
            aside.rename(path)
            shutil.rmtree(retired)
        else:
            aside.rename(path)
        fsync_directory(path.parent)


def remove_directory(path: Path) -> None:
    """Remove a folder and its contents; it is renamed first, so no reader sees a partly removed folder.

    Raises:
        StorageError: a file system operation failed.
    """
    aside = _aside(path)
    with _no_trace(path, aside):
        path.rename(aside)
        fsync_directory(path.parent)
        shutil.rmtree(aside)


def fsync_directory(path: Path) -> None:
    """Make renames and unlinks inside `path` durable."""
    _fsync(path)


def remedy_of(error: OSError) -> str:
    """Return what a user can do about a failed write."""
    return _REMEDIES.get(error.errno or 0, "see the system's message")


def is_aside(path: Path) -> bool:
    """Return whether `path` is a temporary file of a write in progress, or one left by a killed process."""
    return path.name.startswith(".aside-")


def _aside(path: Path) -> Path:
    return path.parent / f".aside-{uuid.uuid4().hex}-{path.name}"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _no_trace(path: Path, aside: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"could not write {path}: {error.strerror or error}; {remedy_of(error)}") from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            # If the write failed, neither the file nor its folder may exist.
            with suppress(OSError):
                aside.unlink(missing_ok=True)
