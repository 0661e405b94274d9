"""Locks on files and folders: what one holds another waits for, or is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hyperagent.storage.file_lock import locked, open_locked


@pytest.fixture(params=["file", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "file":
        return tmp_path / "new.lock"
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_an_exclusive_lock_is_held_alone(path: Path, first: bool, second: bool) -> None:
    with locked(path, exclusive=first), pytest.raises(BlockingIOError, match="another process holds its lock"):
        open_locked(path, exclusive=second)
    os.close(open_locked(path, exclusive=second))


def test_a_shared_lock_is_held_by_many(path: Path) -> None:
    with locked(path, exclusive=False), locked(path, exclusive=False):
        pass


def test_a_refused_lock_leaves_no_descriptor(path: Path) -> None:
    with locked(path, exclusive=True):
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(BlockingIOError):
            open_locked(path, exclusive=True)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_waiting_ends_when_the_lock_is_free_and_not_before(path: Path) -> None:
    descriptor = open_locked(path, exclusive=True)
    threading.Timer(0.3, os.close, [descriptor]).start()
    started = time.monotonic()
    with locked(path, exclusive=True, wait_s=60):
        assert time.monotonic() - started >= 0.3


def test_waiting_ends_in_time(path: Path) -> None:
    with locked(path, exclusive=True):
        started = time.monotonic()
        with pytest.raises(BlockingIOError):
            open_locked(path, exclusive=True, wait_s=0.2)
        assert time.monotonic() - started >= 0.2


def test_another_process_is_refused_and_a_child_does_not_inherit_the_lock(path: Path) -> None:
    program = "import sys; from pathlib import Path; from hyperagent.storage.file_lock import open_locked\n"
    program += "try: open_locked(Path(sys.argv[1]), exclusive=True)\nexcept BlockingIOError: print('refused')\nelse: print('locked')"
    command = [sys.executable, "-c", program, str(path)]
    descriptor = open_locked(path, exclusive=True)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "refused\n"
        os.close(descriptor)
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "locked\n"
    finally:
        child.communicate(b"\n")


def test_a_place_that_cannot_be_locked_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_locked(tmp_path / "none" / "x.lock", exclusive=True)
