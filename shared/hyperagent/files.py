"""Durable writes: a reader sees the old file, the new file, and nothing between.

The order is PostgreSQL's `durable_rename`: write aside, fsync the file, rename, fsync the directory
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
    with new_file(path) as aside:
        aside.write_bytes(content)


def write_once(path: Path, content: bytes) -> bool:
    """Write `content` to `path` unless something is there; of several writers at once exactly one succeeds.

    Returns:
        Whether it was this call that wrote it.

    Raises:
        StorageError: the file system refused.
    """
    aside = _aside(path)
    with _no_trace(path, aside):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        _fsync(aside)
        try:
            # link(2) refuses a name that is taken, where rename(2) replaces it.
            os.link(aside, path)
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
    aside = _aside(path)
    with _no_trace(path, aside):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _fsync(aside)
        aside.replace(path)
        fsync_directory(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; on a clean exit it becomes `path`, whole, replacing what stood there.

    Raises:
        StorageError: the file system refused; `path` is as it was before.
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
    """Remove a folder with all in it; its name is gone at once, so that nobody takes a part of it for the whole.

    Raises:
        StorageError: the file system refused.
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
    """What a user can do about a write that failed."""
    return _REMEDIES.get(error.errno or 0, "see the system's message")


def is_aside(path: Path) -> bool:
    """Whether `path` is a write in progress, or what a killed process left of one."""
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
            # Where nothing could be written there may be nothing to remove, not even a folder.
            with suppress(OSError):
                aside.unlink(missing_ok=True)
