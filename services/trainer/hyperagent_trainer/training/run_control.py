"""Run control in the training loop: save a checkpoint, pause or stop on command.

The supervisor writes the commands to the run's `control.json`, which the training loop reads between steps. Only the
first rank reads it, and all ranks agree on the most severe command, so that they act at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import structlog

from hyperagent.errors import CorruptRecord
from hyperagent_trainer.distributed import Ranks
from hyperagent_trainer.runs.commands import RunCommands, read_commands
from hyperagent_trainer.runs.stop_request import StopRequest
from hyperagent_trainer.training.reporter import RunReporter

log = structlog.get_logger()

_POLL_S = 0.2


class _Order(IntEnum):
    """Action to take now; the most severe command wins."""

    GO_ON = 0
    SAVE = 1
    PAUSE = 2
    STOP = 3


class RunControl:
    """Apply the commands in `control.json` on every rank."""

    def __init__(self, path: Path, stop: StopRequest, ranks: Ranks) -> None:
        """Follow the commands in the file `path` and the event `stop`, which may be set on any rank."""
        self._path = path
        self._stop = stop
        self._ranks = ranks
        self._commands = RunCommands()
        self._read: tuple[int, int] | None = None
        """Identity of the file that the commands were read from; the file is always replaced as a whole."""
        self._num_saved = 0

    def apply(self, save: Callable[[], None], report: RunReporter) -> bool:
        """Save if requested, wait while paused, and return whether to continue; a collective call between two steps."""
        order = self._order()
        if order in (_Order.SAVE, _Order.PAUSE):
            report.state("saving")
            save()
            if order is _Order.PAUSE:
                report.state("paused")
            while order is _Order.PAUSE:
                time.sleep(_POLL_S)
                order = self._order()
            if order is not _Order.STOP:
                report.state("running")
        return order is not _Order.STOP

    def _order(self) -> _Order:
        own = _Order.GO_ON
        if self._ranks.is_first:
            self._look()
            if self._commands.pause:
                own = _Order.PAUSE
            elif self._commands.checkpoints > self._num_saved:
                own = _Order.SAVE
            self._num_saved = self._commands.checkpoints
        if self._stop.is_set():
            own = _Order.STOP
        return _Order(int(self._ranks.max(own)))

    def _look(self) -> None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return
        if (found.st_ino, found.st_mtime_ns) == self._read:
            return
        self._read = (found.st_ino, found.st_mtime_ns)
        try:
            self._commands = read_commands(self._path)
        except CorruptRecord as error:
            # An unreadable command file must not end a run of many hours.
            log.warning("could not read commands", error=str(error))
