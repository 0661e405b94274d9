"""The one training process that may run in a runs folder: queued, started, stopped, resumed, adopted.

Everything about a run is in its folder, and the queue is in `runs.sqlite`, so the supervisor itself can be killed at any
moment: the next one on the same folder adopts a training process that is alive, marks the run of a dead one as failed
and continues with the queue. A run's status has one writer at a time: its process while that is alive, the
supervisor otherwise.

A supervisor that is closed leaves no training process behind; one that is killed by SIGKILL does, and that
process continues to train until it is done or another supervisor adopts it.
"""

from __future__ import annotations

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
from hyperagent.http.run_models import FINAL_STATES, NAME_PATTERN, RunRequest, RunState
from hyperagent.storage.file_lock import open_locked
from hyperagent.storage.files import is_temporary
from hyperagent_trainer.config import load_recipe
from hyperagent_trainer.control.process import TrainingProcess, describe_exit, end_leftovers, training_command
from hyperagent_trainer.control.run_queue import RunQueue
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.runs.commands import RunCommands, read_commands, write_commands
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.store import Run, Runs, new_run_id

MAX_WAITING = 100
"""Most runs that may wait for their turn."""

_LOG_TAIL_BYTES = 4096
_LOG_LINE_CHARACTERS = 300

_log = structlog.get_logger()


@dataclass
class _Training:
    """A training process that the supervisor watches."""

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
        """Lock the runs folder, and take over the runs that an earlier supervisor left in it.

        Args:
            command: replaces every recipe's training command; the run's folder is its last argument.

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
        self._lock = _lock_folder(self.runs.root)
        try:
            self._queue = RunQueue(self.runs.root)
            try:
                self._take_over()
            except BaseException:
                self._is_closed = True
                self._queue.close()
                raise
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Stop the training process as `stop` does, wait for it, and unlock the runs folder; queued runs stay queued."""
        with self._changing:
            self._is_closed = True
            if self._training is not None:
                self._end(self._training)
            self._queue.close()
            os.close(self._lock)

    def recipes(self) -> list[str]:
        """Return the names of the recipes that can be run."""
        return sorted(path.stem for path in self._recipes.glob("*.yaml") if re.fullmatch(NAME_PATTERN, path.stem))

    def start(self, request: RunRequest, *, idempotency_key: str | None = None) -> Run:
        """Start a run, or queue it until the one that trains has ended.

        The same key with the same request again returns the run it started.

        Returns:
            The run in its present state: one that cannot be started has failed already.

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
        """End a run's pause, even one it has not reached yet, or continue a stopped or failed run from its last checkpoint.

        The latter is queued until the run that trains has ended.

        Raises:
            NotFound: there is no such run.
            Conflict: there is nothing to continue, or too many runs wait.
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
                # Wait until the finished process is gone, so that it cannot overwrite the new status.
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
        """Return the run and the process that trains it."""
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
        _log.warning("run forgotten, its folder is gone", run=run_id)
        self._queue.forget(run_id)

    def _require_room(self) -> None:
        if len(self._queue.waiting()) >= MAX_WAITING:
            raise Conflict(f"{MAX_WAITING} runs wait already; stop some of them, or wait")

    def _start_next(self) -> None:
        """Start the first run of the queue that can be started, unless one trains; mark those that cannot as failed."""
        if self._is_closed or (self._training is not None and not self._training.settled.is_set()):
            return
        for run_id in self._queue.waiting():
            try:
                folder = self.runs.folder(run_id)
            except NotFound:
                self._forget(run_id)
                continue
            try:
                # The commands were for an earlier process.
                write_commands(folder.control, RunCommands())
                processes = folder.read_recipe().processes
                command = self._command or training_command(processes, stop_grace_s=self._stop_grace_s)
                process = TrainingProcess.start(folder, command)
            except HyperagentError as error:
                _log.error("run not started", run=run_id, error=str(error))
                _settle(folder, state="failed", reason=str(error))
                self._queue.dequeue(run_id)
                continue
            self._queue.dequeue(run_id)
            _log.info("run started", run=run_id, pid=process.pid)
            self._watch(_Training(run_id, folder, process))
            return

    def _watch(self, training: _Training) -> None:
        self._training = training
        threading.Thread(target=self._await, args=(training,), name=f"watch {training.run_id}", daemon=True).start()

    def _await(self, training: _Training) -> None:
        try:
            exit_code = training.process.wait(lambda: _is_final(training.folder), grace_s=self._stop_grace_s)
            _log.info("run ended", run=training.run_id, exit_code=exit_code)
            self._settle_ended(training, exit_code)
        except HyperagentError as error:
            _log.error("the end of a run not recorded", run=training.run_id, error=str(error))
        finally:
            training.settled.set()
        try:
            with self._changing:
                self._start_next()
        except HyperagentError as error:
            _log.error("the queue is not advanced until the next request", error=str(error))

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
        """Adopt the training process that an earlier supervisor left, and mark the runs whose process died as failed."""
        for path in filter(is_temporary, self.runs.root.iterdir()):
            shutil.rmtree(path)
        runs = self.runs.all()
        for gone in self._queue.ids() - {run.run_id for run in runs}:
            self._forget(gone)
        for run in reversed(runs):
            self._queue.restore(run.run_id, run.idempotency_key, waits=run.status.state == "queued")
            process = TrainingProcess.find(run.folder)
            if process is not None:
                _log.info("run adopted", run=run.run_id, pid=process.pid)
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
    with suppress(HyperagentError):  # a status that cannot be read is not final
        return folder.read_status().state in FINAL_STATES
    return False


def _has_started(folder: RunFolder) -> bool:
    """Return whether the training process has reached the point where it answers SIGTERM; torchrun's exit code does not say."""
    return folder.read_status().state not in ("queued", "loading")


def _same(run: Run, request: RunRequest) -> Run:
    if run.request != request:
        raise Conflict(
            f"the idempotency key {run.idempotency_key!r} started run {run.run_id} with another request; use a new key"
        )
    return run


def _settle(folder: RunFolder, *, state: RunState, reason: str) -> None:
    """Write a final state for a run that has no process, unless its process wrote one."""
    status = folder.read_status()
    if status.state not in FINAL_STATES:
        _write_state(folder, state, f"{reason}; last line of {folder.log}: {_last_line(folder.log)}")


def _write_state(folder: RunFolder, state: RunState, reason: str) -> None:
    """Write the state of a run that has no process."""
    changes = {"state": state, "reason": reason, "eta_s": None, "updated_at": time.time()}
    folder.write_status(folder.read_status().model_copy(update=changes))


def _last_line(path: Path) -> str:
    """Return the last line of a log that is not empty, cut to a readable length."""
    if not path.exists():
        return "(no log)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line[:_LOG_LINE_CHARACTERS] for line in reversed(lines) if line), "(empty)")


def _lock_folder(runs: Path) -> int:
    """Lock the runs folder for as long as the returned descriptor is open; children do not inherit it."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        return open_locked(runs, exclusive=True)
    except BlockingIOError:
        raise ServiceError(f"another control process holds {runs}; stop it, or choose another runs folder") from None
    except OSError as error:
        raise ConfigError(f"cannot use {runs} as the runs folder: {error}; choose another") from error
