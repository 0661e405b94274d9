"""The one training process that may run in a runs folder: started, stopped, resumed, adopted.

Everything a run is lies in its folder, so the supervisor itself can be killed at any moment: the next one
on the same folder adopts a training process that lives and marks the run of a dead one as failed. Of a
run's status there is one writer at a time: its process while it lives, the supervisor otherwise.

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
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from hyperagent.errors import ConfigError, Conflict, HyperagentError, NotFound, ServiceError
from hyperagent.files import is_aside
from hyperagent_trainer.command import training_command
from hyperagent_trainer.config import ControlSettings, load_recipe
from hyperagent_trainer.process import TrainingProcess, describe_exit, end_leftovers
from hyperagent_trainer.run_folder import FINAL_STATES, RunFolder, RunState
from hyperagent_trainer.runs import NAME_PATTERN, Run, RunRequest, Runs
from hyperagent_trainer.wishes import Wishes, read_wishes, write_wishes

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
        self._hold = _hold(self.runs.root)
        try:
            self._take_over()
        except BaseException:
            os.close(self._hold)
            raise

    def close(self) -> None:
        """Stop the training process as `stop` does, wait for it, and let go of the runs folder."""
        with self._changing:
            if self._training is not None:
                self._end(self._training)
            os.close(self._hold)

    def recipes(self) -> list[str]:
        """The names of the recipes that can be run."""
        return sorted(path.stem for path in self._recipes.glob("*.yaml") if re.fullmatch(NAME_PATTERN, path.stem))

    def start(self, request: RunRequest, *, idempotency_key: str | None = None) -> Run:
        """Start a run; the same key with the same request again returns the run it started.

        Raises:
            NotFound: there is no such recipe.
            ConfigError: the recipe is wrong.
            Conflict: a run is training, or the key came with another request before.
            ServiceError, StorageError: the system refused to start it.
        """
        with self._changing:
            if idempotency_key is not None:
                for run in self.runs.all():
                    if run.idempotency_key == idempotency_key:
                        return _same(run, request)
            known = self.recipes()
            if request.recipe not in known:
                raise NotFound(f"there is no recipe {request.recipe!r}; there are: {', '.join(known) or 'none'}")
            recipe = load_recipe(self._recipes / f"{request.recipe}.yaml", request.overrides)
            self._make_room()
            return self._launch(self.runs.create(request, recipe, idempotency_key=idempotency_key))

    def resume(self, run_id: str) -> Run:
        """End a run's pause, also one it has not come to yet, or go on with a stopped or failed run from its last checkpoint.

        Raises:
            NotFound: there is no such run.
            Conflict: there is nothing to go on with, or another run is training.
            ServiceError, StorageError: the system refused to start it.
        """
        with self._changing:
            run = self.runs.get(run_id)
            if self._trains(run):
                wishes = read_wishes(run.folder.control)
                if wishes.pause or run.status.state == "paused":
                    write_wishes(run.folder.control, wishes.model_copy(update={"pause": False}))
                    return run
            if not run.is_resumable:
                raise Conflict(
                    f"run {run_id} is {run.status.state} and cannot be resumed: "
                    "only a paused run, or a stopped or failed one with a checkpoint, can; otherwise start a new run"
                )
            self._make_room()
            changes = {"state": "queued", "reason": "", "eta_s": None, "updated_at": time.time()}
            run.folder.write_status(run.status.model_copy(update=changes))
            return self._launch(run)

    def pause(self, run_id: str) -> Run:
        """Ask a run's process to save and wait before its next step; asking again changes nothing.

        Raises:
            NotFound: there is no such run.
            Conflict: it is not training.
            StorageError: the file system refused.
        """
        with self._changing:
            run, _ = self._in_training(run_id)
            wishes = read_wishes(run.folder.control)
            write_wishes(run.folder.control, wishes.model_copy(update={"pause": True}))
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
            wishes = read_wishes(run.folder.control)
            write_wishes(run.folder.control, wishes.model_copy(update={"checkpoints": wishes.checkpoints + 1}))
            return run

    def stop(self, run_id: str) -> Run:
        """Ask a run's process to save and end; it is killed when it has not after the grace period.

        Returns at once; the run's state tells when it has ended. Asking again changes nothing.

        Raises:
            NotFound: there is no such run.
            Conflict: it is not training.
        """
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

    def _make_room(self) -> None:
        """Refuse while a run is training; a process that has said its last word is ended and waited for."""
        if self._training is None or self._training.settled.is_set():
            return
        state = self._training.folder.read_status().state
        if state not in FINAL_STATES:
            raise Conflict(f"run {self._training.run_id} is {state}, and one run trains at a time; stop it or wait")
        self._end(self._training)

    def _launch(self, run: Run) -> Run:
        try:
            # What was asked of an earlier process is not asked of this one.
            write_wishes(run.folder.control, Wishes())
            processes = run.folder.read_recipe().processes
            command = self._command or training_command(processes, stop_grace_s=self._stop_grace_s)
            process = TrainingProcess.start(run.folder, command)
        except HyperagentError as error:
            _settle(run.folder, state="failed", reason=str(error))
            raise
        log.info("run started", run=run.run_id, pid=process.pid)
        self._watch(_Training(run.run_id, run.folder, process))
        return self.runs.get(run.run_id)

    def _watch(self, training: _Training) -> None:
        self._training = training
        threading.Thread(target=self._await, args=(training,), name=f"watch {training.run_id}", daemon=True).start()

    def _await(self, training: _Training) -> None:
        try:
            exit_code = training.process.wait()
            log.info("run ended", run=training.run_id, exit_code=exit_code)
            if training.killed:
                reason = f"the training process had not ended {self._stop_grace_s:g} s after SIGTERM and was killed"
                _settle(training.folder, state="failed", reason=reason)
            elif training.stop_requested and (
                exit_code in (None, -signal.SIGTERM) or not _has_started(training.folder)
            ):
                reason = "stopped on request before the training process could answer signals"
                _settle(training.folder, state="stopped", reason=reason)
            else:
                _settle(training.folder, state="failed", reason=describe_exit(exit_code))
        finally:
            training.settled.set()

    def _end(self, training: _Training) -> None:
        training.stop_requested = True
        training.process.terminate()
        if not training.settled.wait(self._stop_grace_s):
            training.killed = True
            training.process.kill()
            training.settled.wait()

    def _take_over(self) -> None:
        """Adopt the training process that an earlier supervisor left, and settle the runs whose process died."""
        for path in filter(is_aside, self.runs.root.iterdir()):
            shutil.rmtree(path)
        for run in self.runs.all():
            process = TrainingProcess.find(run.folder)
            if process is None:
                if run.status.state not in FINAL_STATES:
                    end_leftovers(run.folder)
                    _settle(run.folder, state="failed", reason=describe_exit(None))
            else:
                log.info("run adopted", run=run.run_id, pid=process.pid)
                self._watch(_Training(run.run_id, run.folder, process))


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
        reason = f"{reason}; last line of {folder.log}: {_last_line(folder.log)}"
        changes = {"state": state, "reason": reason, "eta_s": None, "updated_at": time.time()}
        folder.write_status(status.model_copy(update=changes))


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
