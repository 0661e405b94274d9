"""One training process: its command, its start, how it is found again, awaited and ended.

The process leads a session of its own, so that neither a terminal's Ctrl-C nor the death of the control
process reaches it, and so that what it leaves behind can be ended as a group. What starts sessions of its
own, as torchrun does for each rank, is found by a variable that it has inherited.

It starts behind a gate: a shell that waits for one line before it becomes the command. The line is sent
once process.json is on the disk, so there is never a training process that a later control process could
not find; should the control process die in between, the gate reads the end of its input and exits.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import psutil

from hyperagent.config import StrictModel
from hyperagent.errors import CorruptRecord, ServiceError
from hyperagent.storage.files import write_atomically
from hyperagent_trainer.runs.folder import RunFolder

_WORKER = ("-m", "hyperagent_trainer.worker")
_GATE = 'read -r line && exec "$@" </dev/null'
_POLL_S = 0.1
_FOLDER_VARIABLE = "HYPERAGENT_RUN_FOLDER"
# Linux derives a creation time from the wall clock's idea of the boot time, which clock corrections move.
_CREATE_TIME_TOLERANCE_S = 2.0


def training_command(processes: int, *, stop_grace_s: float) -> tuple[str, ...]:
    """Return the command that trains a recipe with so many `processes`; the run's folder is to be its last argument.

    Several processes are started, ended and watched by torchrun
    (https://docs.pytorch.org/docs/stable/elastic/run.html), which passes SIGTERM on to each.

    Args:
        stop_grace_s: how long the processes have to save and end after SIGTERM.
    """
    if processes == 1:
        return (sys.executable, *_WORKER)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    # Its own default is half a minute, after which it kills a rank that still writes its checkpoint.
    grace = f"--shutdown-timeout={math.ceil(stop_grace_s)}"
    return (*torchrun, f"--nproc-per-node={processes}", grace, *_WORKER)


class ProcessRecord(StrictModel):
    """The content of process.json."""

    pid: int
    create_time: float
    """Seconds since the epoch; with the pid it tells a process from a later one with the same number."""


class TrainingProcess:
    """The training process of one run, alive or just ended."""

    def __init__(self, process: psutil.Process, folder: RunFolder, *, child: subprocess.Popen[bytes] | None) -> None:
        self._process = process
        self._folder = folder
        # None for an adopted process: only a parent learns an exit code.
        self._child = child

    @classmethod
    def start(cls, folder: RunFolder, command: Sequence[str]) -> TrainingProcess:
        """Run `command` with the run's folder as its last argument, its output appended to the run's log.

        Raises:
            ServiceError: the system could not start a process.
            StorageError: process.json could not be written; nothing was started.
        """
        try:
            with folder.log.open("ab", buffering=0) as log:
                # Without it the last line of an earlier process would pass for this one's.
                log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} starting\n".encode())
                child = subprocess.Popen(
                    ["/bin/sh", "-c", _GATE, "sh", *command, str(folder.root)],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, _FOLDER_VARIABLE: str(folder.root)},
                    start_new_session=True,
                )
        except OSError as error:
            raise ServiceError(
                f"could not start a training process: {error}; see the limits of this user and machine"
            ) from error
        assert child.stdin is not None
        with child.stdin as gate:
            try:
                process = psutil.Process(child.pid)
                record = ProcessRecord(pid=child.pid, create_time=process.create_time())
                write_atomically(folder.process, record.model_dump_json().encode() + b"\n")
            except BaseException:
                child.kill()
                child.wait()
                raise
            # A gate that was killed from outside has no reader; waiting for the process tells.
            with suppress(BrokenPipeError):
                gate.write(b"go\n")
        return cls(process, folder, child=child)

    @classmethod
    def find(cls, folder: RunFolder) -> TrainingProcess | None:
        """The living process that process.json names; None if it has ended.

        A pid alone proves nothing, since the system gives it out again: the creation time must agree, and
        the command line must name the run's folder.

        Raises:
            CorruptRecord: process.json cannot be read.
        """
        try:
            record = ProcessRecord.model_validate_json(folder.process.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CorruptRecord(
                f"{folder.process} is damaged; end the run's process if it lives, then delete the file"
            ) from error
        try:
            process = psutil.Process(record.pid)
            found = cls(process, folder, child=None)
            same = (
                abs(process.create_time() - record.create_time) < _CREATE_TIME_TOLERANCE_S
                and str(folder.root) in process.cmdline()
                and found.is_alive()
            )
        except psutil.Error:  # ended, or another user's
            return None
        return found if same else None

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process still runs; a zombie does not."""
        try:
            return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def wait(self, is_over: Callable[[], bool], *, grace_s: float) -> int | None:
        """Block until the process ends, then end what it left running.

        Args:
            is_over: whether the process has finished its work; from then on it has `grace_s` seconds to exit.

        Returns:
            The exit code, or minus the number of the signal that ended it; None for an adopted process.
        """
        over_at: float | None = None
        while self.is_alive() and (over_at is None or time.monotonic() - over_at < grace_s):
            time.sleep(_POLL_S)
            if over_at is None and is_over():
                over_at = time.monotonic()
        self._kill_all()
        return self._child.wait() if self._child else None

    def terminate(self) -> None:
        """Ask the process to save and end (SIGTERM); it ends its own children."""
        with suppress(psutil.NoSuchProcess):
            self._process.terminate()

    def kill(self) -> None:
        """End the process and all it started, at once (SIGKILL)."""
        if self.is_alive():
            self._kill_all()

    def _kill_all(self) -> None:
        # The group of a process that has ended may be gone, and its number given to another.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        end_leftovers(self._folder)


def end_leftovers(folder: RunFolder) -> None:
    """End (SIGKILL) every process that a training process of the run started and left running."""
    for process in psutil.process_iter():
        # One that has ended, or is another user's, is no leftover.
        with suppress(psutil.Error):
            if process.environ().get(_FOLDER_VARIABLE) == str(folder.root):
                process.kill()


def describe_exit(exit_code: int | None) -> str:
    """Return how a process ended, for a person to read."""
    if exit_code is None:
        return "the training process ended, how is not known: an earlier control process had started it"
    if exit_code >= 0:
        return f"the training process ended with exit code {exit_code} before the run was over"
    if exit_code == -signal.SIGKILL:
        return "the training process was ended by SIGKILL; when nobody sent it, the system ran out of memory"
    names = {number.value: number.name for number in signal.Signals}
    return f"the training process was ended by {names.get(-exit_code, f'signal {-exit_code}')}"
