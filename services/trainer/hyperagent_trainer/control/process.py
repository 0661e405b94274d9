"""Training process of a run: build its command, start it, find it again, wait for it and end it.

The process leads its own session, so that neither Ctrl-C in a terminal nor the death of the control process affects
it, and so that its remaining children can be killed as a group. Children in sessions of their own, such as the ranks
of torchrun, are found by an inherited environment variable.

It is started by a gate: a shell that waits for one line before it executes the command. The line is sent once
process.json is on disk, so a later control process can find every training process; if the control process dies in
between, the gate reads the end of its input and exits.
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
COMPARISON_COMMAND = (sys.executable, "-m", "hyperagent_trainer.comparison.worker")
"""Command that compares runs; the caller appends the folder of the comparison's own run as an argument."""
_GATE = 'read -r line && exec "$@" </dev/null'
_POLL_S = 0.1
_FOLDER_VARIABLE = "HYPERAGENT_RUN_FOLDER"
# Linux derives creation times from the boot time in wall-clock time, which changes with clock corrections.
_CREATE_TIME_TOLERANCE_S = 2.0


def training_command(processes: int, *, stop_grace_s: float) -> tuple[str, ...]:
    """Return the command that trains with `processes` processes; the caller appends the run's folder as an argument.

    Multiple processes are started, stopped and monitored by torchrun
    (https://docs.pytorch.org/docs/stable/elastic/run.html), which passes SIGTERM on to each.

    Args:
        stop_grace_s: seconds that the processes have to save and exit after SIGTERM.
    """
    if processes == 1:
        return (sys.executable, *_WORKER)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    # The default of 30 s would kill a rank that is still writing its checkpoint.
    grace = f"--shutdown-timeout={math.ceil(stop_grace_s)}"
    return (*torchrun, f"--nproc-per-node={processes}", grace, *_WORKER)


class ProcessRecord(StrictModel):
    """Contents of process.json."""

    pid: int
    create_time: float
    """Seconds since the epoch; distinguishes the process from later ones with the same pid."""


class TrainingProcess:
    """Training process of one run, running or just ended."""

    def __init__(self, process: psutil.Process, folder: RunFolder, *, child: subprocess.Popen[bytes] | None) -> None:
        self._process = process
        self._folder = folder
        # None for an adopted process, because only a parent can read the exit code.
        self._child = child

    @classmethod
    def start(cls, folder: RunFolder, command: Sequence[str]) -> TrainingProcess:
        """Run `command` with the run's folder as its last argument, and append its output to the run's log.

        Raises:
            ServiceError: the system could not start a process.
            StorageError: process.json could not be written; nothing was started.
        """
        try:
            with folder.log.open("ab", buffering=0) as log:
                # Otherwise the last line of an earlier process could be mistaken for this one's.
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
                f"could not start a training process: {error}; check the limits of this user and machine"
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
            # The gate was killed from outside; `wait` will report it.
            with suppress(BrokenPipeError):
                gate.write(b"go\n")
        return cls(process, folder, child=child)

    @classmethod
    def find(cls, folder: RunFolder) -> TrainingProcess | None:
        """Return the running process recorded in process.json, or None if it has ended.

        A pid alone is not sufficient, since the system reuses pids: the creation time must match, and the command line
        must contain the run's folder.

        Raises:
            CorruptRecord: process.json cannot be read.
        """
        try:
            record = ProcessRecord.model_validate_json(folder.process.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CorruptRecord(
                f"{folder.process} is damaged; end the run's process if it is running, then delete the file"
            ) from error
        try:
            process = psutil.Process(record.pid)
            found = cls(process, folder, child=None)
            same = (
                abs(process.create_time() - record.create_time) < _CREATE_TIME_TOLERANCE_S
                and str(folder.root) in process.cmdline()
                and found.is_alive()
            )
        except psutil.Error:  # The process has ended or belongs to another user.
            return None
        return found if same else None

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        """Return whether the process is still running; a zombie is not."""
        try:
            return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def wait(self, grace_s: Callable[[], float | None]) -> int | None:
        """Block until the process ends, then kill its remaining children.

        Args:
            grace_s: returns how many seconds the process has to exit because it has finished its work, or None until then.

        Returns:
            The exit code, or minus the number of the signal that killed it; None for an adopted process.
        """
        deadline: float | None = None
        while self.is_alive() and (deadline is None or time.monotonic() < deadline):
            time.sleep(_POLL_S)
            if deadline is None and (seconds := grace_s()) is not None:
                deadline = time.monotonic() + seconds
        self._kill_all()
        return self._child.wait() if self._child else None

    def terminate(self) -> None:
        """Request that the process save and exit (SIGTERM); it stops its own children."""
        with suppress(psutil.NoSuchProcess):
            self._process.terminate()

    def kill(self) -> None:
        """Kill the process and all its children at once (SIGKILL)."""
        if self.is_alive():
            self._kill_all()

    def _kill_all(self) -> None:
        # The group of an ended process may be gone and its number reused.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        end_leftovers(self._folder)


def end_leftovers(folder: RunFolder) -> None:
    """Kill (SIGKILL) every process that a training process of the run has left running."""
    for process in psutil.process_iter():
        # Processes that have ended or belong to another user are not leftovers.
        with suppress(psutil.Error):
            if process.environ().get(_FOLDER_VARIABLE) == str(folder.root):
                process.kill()


def describe_exit(exit_code: int | None) -> str:
    """Return a readable description of how a process ended."""
    if exit_code is None:
        return "the training process ended; its exit code is unknown because an earlier control process had started it"
    if exit_code >= 0:
        return f"the training process ended with exit code {exit_code} before the run was over"
    if exit_code == -signal.SIGKILL:
        return "the training process was killed by SIGKILL; if nobody sent it, the system ran out of memory"
    names = {number.value: number.name for number in signal.Signals}
    return f"the training process was killed by {names.get(-exit_code, f'signal {-exit_code}')}"
