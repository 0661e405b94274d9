"""Commands to a running training: save a checkpoint, pause, stop.

The supervisor writes the commands into the run's `control.json`, the training loop looks there between two steps. The first
rank alone reads them, and all act on what it has read: at the same step, whatever each would have seen by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import structlog

from hyperagent.errors import CorruptRecord
from hyperagent_trainer.distributed import Ranks
from hyperagent_trainer.runs.commands import RunCommands, read_commands
from hyperagent_trainer.training.reporter import RunReporter

log = structlog.get_logger()

_POLL_S = 0.2


class _Order(IntEnum):
    """What to do now; the most severe command wins."""

    GO_ON = 0
    SAVE = 1
    PAUSE = 2
    STOP = 3


class RunControl:
    """The training loop's side of `control.json`; one on every rank."""

    def __init__(self, path: Path, stop: threading.Event, ranks: Ranks) -> None:
        """Follow the commands in the file `path`, and `stop`, which may be set on any rank."""
        self._path = path
        self._stop = stop
        self._ranks = ranks
        self._commands = RunCommands()
        self._read: tuple[int, int] | None = None
        """Which file the commands were read from; a new one replaces it as a whole."""
        self._num_saved = 0

    def apply(self, save: Callable[[], None], report: RunReporter) -> bool:
        """Between two steps, on every rank: save if asked, wait out a pause; returns whether to go on training."""
        order = self._order()
        if order in (_Order.SAVE, _Order.PAUSE):
            report.state("saving")
            save()
            if order is _Order.PAUSE:
                report.state("paused")
            while order is _Order.PAUSE:
                self._stop.wait(_POLL_S)
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
            # No reason to end a run of many hours.
            log.warning("commands not read", error=str(error))
