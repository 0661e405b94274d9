"""Supervisor of the only training process that may run in a runs folder: queue, start, stop, resume, adopt.

Everything about a run is in its folder, and the queue is in `runs.sqlite`, so the supervisor itself can be killed at any
moment: the next one on the same folder adopts a running training process, marks the run of a dead one as failed and
continues with the queue. A run's status has one writer at a time: its process while that is running, otherwise the
supervisor.

Closing a supervisor stops its training process. If it is killed by SIGKILL, the training process continues until it is
done or another supervisor adopts it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog

from hyperagent.errors import ConfigError, Conflict, HyperagentError, NotFound
from hyperagent.http.run_models import FINAL_STATES, NAME_PATTERN, ComparisonRequest, RunRequest
from hyperagent.storage.files import is_temporary
from hyperagent_trainer.config import load_recipe
from hyperagent_trainer.control.final_state import has_started, is_final, settle, write_state
from hyperagent_trainer.control.process import (
    COMPARISON_COMMAND,
    TrainingProcess,
    describe_exit,
    end_leftovers,
    training_command,
)
from hyperagent_trainer.control.run_queue import RunQueue
from hyperagent_trainer.control.settings import ControlSettings
from hyperagent_trainer.runs.commands import RunCommands, read_commands, write_commands
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.store import Run, Runs, lock_runs, new_run_id

MAX_WAITING = 100
"""Maximum number of queued runs."""

_FAILED_GRACE_S = 5.0
"""Seconds that the other ranks of a failed run have to write their own tracebacks."""

_log = structlog.get_logger()


@dataclass
class _Training:
    """Training process that the supervisor monitors."""

    run_id: str
    folder: RunFolder
    process: TrainingProcess
    stop_requested: bool = False
    killed: bool = False
    settled: threading.Event = field(default_factory=threading.Event)
    """Set once the process has ended and the run's status is final."""


class Supervisor:
    """Start, stop and resume runs; thread-safe.

    Attributes:
        runs: store of the runs, for listing and reading them.
    """

    def __init__(self, settings: ControlSettings, *, command: Sequence[str] | None = None) -> None:
        """Lock the runs folder and take over the runs that an earlier supervisor left in it.

        Args:
            command: replaces every recipe's training command; the run's folder is its last argument.

        Raises:
            ConfigError: there is no recipes folder, or the runs folder cannot be created.
            ServiceError: another control process uses the runs folder.
            CorruptRecord: the files of an earlier run cannot be read.
        """
        if not settings.recipes.is_dir():
            raise ConfigError(f"there is no recipes folder {settings.recipes}; give one with NAME.yaml files")
        self.runs = Runs(settings.runs.resolve())
        self._recipes = settings.recipes.resolve()
        self._stop_grace_s = settings.stop_grace_s
        self._command = command
        self._changing = threading.Lock()
        self._training: _Training | None = None
        self._is_closed = False
        self.is_closing = threading.Event()
        self._lock = lock_runs(self.runs.root)
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

    def begin_close(self) -> None:
        """Request that the training process save and exit, without waiting for it, and set `is_closing`; `close` follows."""
        self.is_closing.set()
        with self._changing:
            self._is_closed = True
            if self._training is not None and not self._training.settled.is_set():
                self._training.stop_requested = True
                self._training.process.terminate()

    def close(self) -> None:
        """Stop the training process as `stop` does, wait for it, and unlock the runs folder; queued runs stay queued."""
        with self._changing:
            self._is_closed = True
            if self._training is not None:
                self._end(self._training)
            self._queue.close()
            os.close(self._lock)

    def recipes(self) -> list[str]:
        """Return the names of the available recipes."""
        return sorted(path.stem for path in self._recipes.glob("*.yaml") if re.fullmatch(NAME_PATTERN, path.stem))

    def start(self, request: RunRequest, *, idempotency_key: str | None = None) -> Run:
        """Start a run, or queue it until the active one has ended.

        Repeating a request with the same key returns the run that it started.

        Returns:
            The run in its current state, which is "failed" if it could not be started.

        Raises:
            NotFound: there is no such recipe.
            ConfigError: the recipe is invalid.
            Conflict: the queue is full, or the key was used with a different request.
            StorageError: a file operation failed.
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

    def compare(self, request: ComparisonRequest, *, idempotency_key: str | None = None) -> Run:
        """Start a run that compares other runs of this folder, or queue it until the active one has ended.

        Repeating a request with the same key returns the run that it started.

        Raises:
            NotFound: one of the runs does not exist.
            ConfigError: one of them is a comparison itself.
            Conflict: the queue is full, or the key was used with a different request.
            StorageError: a file operation failed.
        """
        with self._changing:
            if idempotency_key is not None and (known := self._started_with(idempotency_key)) is not None:
                return _same(known, request)
            for compared in (*request.own, *request.static, *request.trained_on_shuffled):
                if isinstance(self.runs.get(compared).request, ComparisonRequest):
                    raise ConfigError(f"run {compared} is a comparison; name training runs")
            self._require_room()
            run_id = new_run_id()
            create = partial(self.runs.create_comparison, run_id, request, idempotency_key=idempotency_key)
            self._queue.add(run_id, idempotency_key, make_folder=create)
            self._start_next()
            return self.runs.get(run_id)

    def resume(self, run_id: str) -> Run:
        """Unpause a run, even before it has paused, or continue a stopped or failed run from its last checkpoint.

        A stopped or failed run is queued until the active run has ended.

        Raises:
            NotFound: there is no such run.
            Conflict: there is nothing to continue, or the queue is full.
            StorageError: a file operation failed.
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
            write_state(run.folder, "queued", "")
            self._start_next()
            return self.runs.get(run_id)

    def pause(self, run_id: str) -> Run:
        """Request that a run's process save and pause before its next step; idempotent.

        Raises:
            NotFound: there is no such run.
            Conflict: the run is not training.
            StorageError: a file operation failed.
        """
        with self._changing:
            run = self._in_training_of_a_network(run_id)
            commands = read_commands(run.folder.control)
            write_commands(run.folder.control, commands.model_copy(update={"pause": True}))
            return run

    def checkpoint(self, run_id: str) -> Run:
        """Request that a run's process save before its next step; a paused run has already done so.

        Raises:
            NotFound: there is no such run.
            Conflict: the run is not training.
            StorageError: a file operation failed.
        """
        with self._changing:
            run = self._in_training_of_a_network(run_id)
            commands = read_commands(run.folder.control)
            write_commands(run.folder.control, commands.model_copy(update={"checkpoints": commands.checkpoints + 1}))
            return run

    def stop(self, run_id: str) -> Run:
        """Remove a run from the queue, or request that its process save and exit; kill it after the grace period.

        Return at once; the run's state changes when it has stopped. Repeated calls have no effect.

        Raises:
            NotFound: there is no such run.
            Conflict: the run is neither training nor queued.
            StorageError: a file operation failed.
        """
        with self._changing:
            if run_id in self._queue.waiting():
                run = self.runs.get(run_id)
                write_state(run.folder, "stopped", "stopped on request while it was queued")
                self._queue.dequeue(run_id)
                return self.runs.get(run_id)
            run, training = self._in_training(run_id)
            threading.Thread(target=self._end, args=(training,), name=f"stop {run_id}", daemon=True).start()
            return run

    def _in_training(self, run_id: str) -> tuple[Run, _Training]:
        """Return a run and its training process."""
        run, training = self.runs.get(run_id), self._training
        if training is None or not self._trains(run):
            raise Conflict(f"run {run_id} is {run.status.state}; there is nothing to stop, pause or save")
        return run, training

    def _in_training_of_a_network(self, run_id: str) -> Run:
        run, _ = self._in_training(run_id)
        if isinstance(run.request, ComparisonRequest):
            raise Conflict(f"run {run_id} compares other runs: it can be stopped, but neither paused nor saved")
        return run

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
        _log.warning("run removed because its folder is gone", run=run_id)
        self._queue.forget(run_id)

    def _require_room(self) -> None:
        if len(self._queue.waiting()) >= MAX_WAITING:
            raise Conflict(f"{MAX_WAITING} runs are queued already; stop some of them, or wait")

    def _start_next(self) -> None:
        """Start the next run of the queue unless one is active; mark runs that cannot be started as failed."""
        if self._is_closed or (self._training is not None and not self._training.settled.is_set()):
            return
        for run_id in self._queue.waiting():
            try:
                run = self.runs.get(run_id)
            except NotFound:
                self._forget(run_id)
                continue
            folder = run.folder
            try:
                # The commands were meant for an earlier process.
                write_commands(folder.control, RunCommands())
                process = TrainingProcess.start(folder, self._command_of(run))
            except HyperagentError as error:
                _log.error("run not started", run=run_id, error=str(error))
                settle(folder, state="failed", reason=str(error))
                self._queue.dequeue(run_id)
                continue
            self._queue.dequeue(run_id)
            _log.info("run started", run=run_id, pid=process.pid)
            self._watch(_Training(run_id, folder, process))
            return

    def _command_of(self, run: Run) -> Sequence[str]:
        if isinstance(run.request, ComparisonRequest):
            return COMPARISON_COMMAND
        processes = run.folder.read_recipe().processes
        return self._command or training_command(processes, stop_grace_s=self._stop_grace_s)

    def _watch(self, training: _Training) -> None:
        self._training = training
        threading.Thread(target=self._await, args=(training,), name=f"watch {training.run_id}", daemon=True).start()

    def _await(self, training: _Training) -> None:
        try:
            exit_code = training.process.wait(lambda: self._grace_s(training.folder))
            _log.info("run ended", run=training.run_id, exit_code=exit_code)
            self._settle_ended(training, exit_code)
        except HyperagentError as error:
            _log.error("could not record the end of a run", run=training.run_id, error=str(error))
        finally:
            training.settled.set()
        try:
            with self._changing:
                self._start_next()
        except HyperagentError as error:
            _log.error("could not advance the queue before the next request", error=str(error))

    def _grace_s(self, folder: RunFolder) -> float | None:
        """Return how long the process of a run may go on: after a failure, ranks that wait for the failed one are killed."""
        if not is_final(folder):
            return None
        return _FAILED_GRACE_S if folder.read_status().state == "failed" else self._stop_grace_s

    def _settle_ended(self, training: _Training, exit_code: int | None) -> None:
        if training.killed:
            reason = f"the training process had not ended {self._stop_grace_s:g} s after SIGTERM and was killed"
            settle(training.folder, state="failed", reason=reason)
        elif training.stop_requested and (exit_code in (None, -signal.SIGTERM) or not has_started(training.folder)):
            reason = "stopped on request before the training process could answer signals"
            settle(training.folder, state="stopped", reason=reason)
        else:
            settle(training.folder, state="failed", reason=describe_exit(exit_code))

    def _end(self, training: _Training) -> None:
        training.stop_requested = True
        training.process.terminate()
        if not training.settled.wait(self._stop_grace_s):
            training.killed = True
            training.process.kill()
            training.settled.wait()

    def _take_over(self) -> None:
        """Adopt a training process left by an earlier supervisor, and mark runs whose process died as failed."""
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
                settle(run.folder, state="failed", reason=describe_exit(None))
            self._queue.dequeue(run.run_id)
        with self._changing:
            self._start_next()


def _same(run: Run, request: RunRequest | ComparisonRequest) -> Run:
    if run.request != request:
        raise Conflict(
            f"the idempotency key {run.idempotency_key!r} started run {run.run_id} with another request; use a new key"
        )
    return run
