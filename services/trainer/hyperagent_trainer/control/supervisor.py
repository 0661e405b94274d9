"""The one training process that may run in a runs folder: queued, started, stopped, resumed, adopted.

What a run is lies in its folder and which runs wait in the ledger, so the supervisor itself can be killed at any
moment: the next one on the same folder adopts a training process that lives, marks the run of a dead one as failed
and goes on with the queue. Of a run's status there is one writer at a time: its process while it lives, the
supervisor otherwise.

A supervisor that is closed leaves no training process behind; one that is killed by SIGKILL does, and that
process goes on training until it is done or another supervisor adopts it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from hyperagent.errors import ConfigError, Conflict, HyperagentError, NotFound, ServiceError
from hyperagent.files import is_temporary
from hyperagent.http.run_models import FINAL_STATES, NAME_PATTERN, RunRequest, RunState
from hyperagent_trainer.config import load_recipe
from hyperagent_trainer.control.command import training_command
from hyperagent_trainer.control.process import TrainingProcess, describe_exit, end_leftovers
from hyperagent_trainer.control.run_queue import RunQueue
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.runs.commands import RunCommands, read_commands, write_commands
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.store import Run, Runs, new_run_id

MAX_WAITING = 100
"""Most runs that may wait for their turn."""

_LOG_TAIL_BYTES = 4096
_LOG_LINE_CHARACTERS = 300

log = structlog.get_logger()


@dataclass
class _Training:
    """A training process under watch."""

    run_id: str
    folder: RunFolder
    process: TrainingProcess
    stop_requested: bool = False
    killed: bool = False
    settled: threading.Event = field(default_factory=threading.Event)
    """Set once the process has ended and the run's status is final."""


class Supervisor:
    """Starts, stops and resumes runs; safe to call from many threads.

    Attributes:
        runs: the runs, to list and read.
    """

    def __init__(self, settings: ControlSettings, *, command: Sequence[str] | None = None) -> None:
        """Take hold of the runs folder, and over what an earlier supervisor left in it.

        Args:
            command: stands in for every recipe's own training process; a run's folder follows.

        Raises:
            ConfigError: there is no recipes folder, or the runs folder cannot be made.
            ServiceError: another control process holds the runs folder.
            CorruptRecord: the files of an earlier run cannot be read.
        """
        if not settings.recipes.is_dir():
            raise ConfigError(f"there is no recipes folder {settings.recipes}; name one that holds NAME.yaml files")
        self.runs = Runs(settings.runs.resolve())
        self._recipes = settings.recipes.resolve()
        self._stop_grace_s = settings.stop_grace_s
        self._command = command
        self._changing = threading.Lock()
        self._training: _Training | None = None
        self._is_closed = False
        self._hold = _hold(self.runs.root)
        try:
            self._queue = RunQueue(self.runs.root)
            try:
                self._take_over()
            except BaseException:
                self._is_closed = True
                self._queue.close()
                raise
        except BaseException:
            os.close(self._hold)
            raise

    def close(self) -> None:
        """Stop the training process as `stop` does, wait for it, and let go of the runs folder; what waits goes on waiting."""
        with self._changing:
            self._is_closed = True
            if self._training is not None:
                self._end(self._training)
            self._queue.close()
            os.close(self._hold)

    def recipes(self) -> list[str]:
        """The names of the recipes that can be run."""
        return sorted(path.stem for path in self._recipes.glob("*.yaml") if re.fullmatch(NAME_PATTERN, path.stem))

    def start(self, request: RunRequest, *, idempotency_key: str | None = None) -> Run:
        """Start a run, or let it wait until the one that trains has ended.

        The same key with the same request again returns the run it started.

        Returns:
            The run as it stands now: one that cannot be started is failed already.

        Raises:
            NotFound: there is no such recipe.
            ConfigError: the recipe is wrong.
            Conflict: too many runs wait, or the key came with another request before.
            StorageError: the file system refused.
        """
        with self._changing:
            if idempotency_key is not None and (known := self._started_with(idempotency_key)) is not None:
                return _same(known, request)
            recipes = self.recipes()
            if request.recipe not in recipes:
                raise NotFound(f"there is no recipe {request.recipe!r}; there are: {', '.join(recipes) or 'none'}")
            recipe = load_recipe(self._recipes / f"{request.recipe}.yaml", request.overrides)
            self._require_room()
            run_id = new_run_id()
            create = partial(self.runs.create, run_id, request, recipe, idempotency_key=idempotency_key)
            self._queue.add(run_id, idempotency_key, make_folder=create)
            self._start_next()
            return self.runs.get(run_id)

    def resume(self, run_id: str) -> Run:
        """End a run's pause, also one it has not come to yet, or go on with a stopped or failed run from its last checkpoint.

        The latter waits until the run that trains has ended.

        Raises:
            NotFound: there is no such run.
            Conflict: there is nothing to go on with, or too many runs wait.
            StorageError: the file system refused.
        """
        with self._changing:
            run = self.runs.get(run_id)
            if self._trains(run):
                commands = read_commands(run.folder.control)
                if commands.pause or run.status.state == "paused":
                    write_commands(run.folder.control, commands.model_copy(update={"pause": False}))
                    return run
            if not run.is_resumable:
                raise Conflict(
                    f"run {run_id} is {run.status.state} and cannot be resumed: "
                    "only a paused run, or a stopped or failed one with a checkpoint, can; otherwise start a new run"
                )
            self._require_room()
            if self._training is not None and self._training.run_id == run_id:
                # It has said its last word, and must not say another about what follows.
                self._end(self._training)
            self._queue.enqueue(run_id)
            _write_state(run.folder, "queued", "")
            self._start_next()
            return self.runs.get(run_id)

    def pause(self, run_id: str) -> Run:
        """Ask a run's process to save and wait before its next step; asking again changes nothing.

        Raises:
            NotFound: there is no such run.
            Conflict: it is not training.
            StorageError: the file system refused.
        """
        with self._changing:
            run, _ = self._in_training(run_id)
            commands = read_commands(run.folder.control)
            write_commands(run.folder.control, commands.model_copy(update={"pause": True}))
            return run

    def checkpoint(self, run_id: str) -> Run:
        """Ask a run's process to save before its next step; a run that pauses has done so already.

        Raises:
            NotFound: there is no such run.
            Conflict: it is not training.
            StorageError: the file system refused.
        """
        with self._changing:
            run, _ = self._in_training(run_id)
            commands = read_commands(run.folder.control)
            write_commands(run.folder.control, commands.model_copy(update={"checkpoints": commands.checkpoints + 1}))
            return run

    def stop(self, run_id: str) -> Run:
        """Take a run out of the queue, or ask its process to save and end; it is killed when it has not after the grace period.

        Returns at once; the run's state tells when it has ended. Asking again changes nothing.

        Raises:
            NotFound: there is no such run.
            Conflict: it neither trains nor waits.
            StorageError: the file system refused.
        """
        with self._changing:
            if run_id in self._queue.waiting():
                run = self.runs.get(run_id)
                _write_state(run.folder, "stopped", "stopped on request while it waited for its turn")
                self._queue.dequeue(run_id)
                return self.runs.get(run_id)
            run, training = self._in_training(run_id)
            threading.Thread(target=self._end, args=(training,), name=f"stop {run_id}", daemon=True).start()
            return run

    def _in_training(self, run_id: str) -> tuple[Run, _Training]:
        """The run and the process that trains it."""
        run, training = self.runs.get(run_id), self._training
        if training is None or not self._trains(run):
            raise Conflict(f"run {run_id} is {run.status.state}; there is nothing to stop, pause or save")
        return run, training

    def _trains(self, run: Run) -> bool:
        training = self._training
        return training is not None and training.run_id == run.run_id and run.status.state not in FINAL_STATES

    def _started_with(self, idempotency_key: str) -> Run | None:
        run_id = self._queue.started_with(idempotency_key)
        if run_id is None:
            return None
        try:
            return self.runs.get(run_id)
        except NotFound:
            self._forget(run_id)
            return None

    def _forget(self, run_id: str) -> None:
        log.warning("run forgotten, its folder is gone", run=run_id)
        self._queue.forget(run_id)

    def _require_room(self) -> None:
        if len(self._queue.waiting()) >= MAX_WAITING:
            raise Conflict(f"{MAX_WAITING} runs wait already; stop some of them, or wait")

    def _start_next(self) -> None:
        """Start the run whose turn it is, unless one trains; runs that cannot be started are failed."""
        if self._is_closed or (self._training is not None and not self._training.settled.is_set()):
            return
        for run_id in self._queue.waiting():
            try:
                folder = self.runs.folder(run_id)
            except NotFound:
                self._forget(run_id)
                continue
            try:
                # What was asked of an earlier process is not asked of this one.
                write_commands(folder.control, RunCommands())
                processes = folder.read_recipe().processes
                command = self._command or training_command(processes, stop_grace_s=self._stop_grace_s)
                process = TrainingProcess.start(folder, command)
            except HyperagentError as error:
                log.error("run not started", run=run_id, error=str(error))
                _settle(folder, state="failed", reason=str(error))
                self._queue.dequeue(run_id)
                continue
            self._queue.dequeue(run_id)
            log.info("run started", run=run_id, pid=process.pid)
            self._watch(_Training(run_id, folder, process))
            return

    def _watch(self, training: _Training) -> None:
        self._training = training
        threading.Thread(target=self._await, args=(training,), name=f"watch {training.run_id}", daemon=True).start()

    def _await(self, training: _Training) -> None:
        try:
            exit_code = training.process.wait(lambda: _is_final(training.folder), grace_s=self._stop_grace_s)
            log.info("run ended", run=training.run_id, exit_code=exit_code)
            self._settle_ended(training, exit_code)
        except HyperagentError as error:
            log.error("the end of a run not recorded", run=training.run_id, error=str(error))
        finally:
            training.settled.set()
        try:
            with self._changing:
                self._start_next()
        except HyperagentError as error:
            log.error("the queue stands still until the next request", error=str(error))

    def _settle_ended(self, training: _Training, exit_code: int | None) -> None:
        if training.killed:
            reason = f"the training process had not ended {self._stop_grace_s:g} s after SIGTERM and was killed"
            _settle(training.folder, state="failed", reason=reason)
        elif training.stop_requested and (exit_code in (None, -signal.SIGTERM) or not _has_started(training.folder)):
            reason = "stopped on request before the training process could answer signals"
            _settle(training.folder, state="stopped", reason=reason)
        else:
            _settle(training.folder, state="failed", reason=describe_exit(exit_code))

    def _end(self, training: _Training) -> None:
        training.stop_requested = True
        training.process.terminate()
        if not training.settled.wait(self._stop_grace_s):
            training.killed = True
            training.process.kill()
            training.settled.wait()

    def _take_over(self) -> None:
        """Adopt the training process that an earlier supervisor left, and settle the runs whose process died."""
        for path in filter(is_temporary, self.runs.root.iterdir()):
            shutil.rmtree(path)
        runs = self.runs.all()
        for gone in self._queue.ids() - {run.run_id for run in runs}:
            self._forget(gone)
        for run in reversed(runs):
            self._queue.restore(run.run_id, run.idempotency_key, waits=run.status.state == "queued")
            process = TrainingProcess.find(run.folder)
            if process is not None:
                log.info("run adopted", run=run.run_id, pid=process.pid)
                self._watch(_Training(run.run_id, run.folder, process))
            elif run.status.state == "queued" and run.run_id in self._queue.waiting():
                continue
            elif run.status.state not in FINAL_STATES:
                end_leftovers(run.folder)
                _settle(run.folder, state="failed", reason=describe_exit(None))
            self._queue.dequeue(run.run_id)
        with self._changing:
            self._start_next()


def _is_final(folder: RunFolder) -> bool:
    with suppress(HyperagentError):  # what cannot be read is no last word
        return folder.read_status().state in FINAL_STATES
    return False


def _has_started(folder: RunFolder) -> bool:
    """Whether the training process has come to the point where it answers SIGTERM; torchrun's exit code does not tell."""
    return folder.read_status().state not in ("queued", "loading")


def _same(run: Run, request: RunRequest) -> Run:
    if run.request != request:
        raise Conflict(
            f"the idempotency key {run.idempotency_key!r} started run {run.run_id} with another request; use a new key"
        )
    return run


def _settle(folder: RunFolder, *, state: RunState, reason: str) -> None:
    """Give a run without a process a final state, unless its process left one."""
    status = folder.read_status()
    if status.state not in FINAL_STATES:
        _write_state(folder, state, f"{reason}; last line of {folder.log}: {_last_line(folder.log)}")


def _write_state(folder: RunFolder, state: RunState, reason: str) -> None:
    """What the supervisor says of a run that has no process."""
    changes = {"state": state, "reason": reason, "eta_s": None, "updated_at": time.time()}
    folder.write_status(folder.read_status().model_copy(update=changes))


def _last_line(path: Path) -> str:
    """The last line of a log that says something, cut to a readable length."""
    if not path.exists():
        return "(no log)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line[:_LOG_LINE_CHARACTERS] for line in reversed(lines) if line), "(empty)")


def _hold(runs: Path) -> int:
    """Lock the runs folder for as long as the returned descriptor is open, which no child inherits."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(runs, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot use {runs} as the runs folder: {error}; choose another") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ServiceError(f"another control process holds {runs}; stop it, or choose another runs folder") from None
    return descriptor
