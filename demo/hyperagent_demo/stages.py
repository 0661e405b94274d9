"""Time the stages of the demo and show their progress bars."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import Progress, TaskID

from hyperagent.cli.display import stderr


class Bar:
    """Progress bar of one stage."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def update(self, done: float, total: float, note: str = "") -> None:
        """Show `done` of `total`."""
        self._bars.update(self._task, completed=done, total=total, note=note)


class Stages:
    """Times the stages by name."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, *, total: float | None = None) -> Iterator[Bar]:
        """Show a stage's progress bar and time the block."""
        task = self._bars.add_task(name, total=total, note="")
        started = time.monotonic()
        yield Bar(self._bars, task)
        self.seconds[name] = round(time.monotonic() - started, 2)
        total = self._bars.tasks[self._bars.task_ids.index(task)].total or 1
        self._bars.update(task, completed=total, total=total)
        if not stderr.is_terminal:
            # Without a terminal, bars are drawn only once at the end, so print a line per stage.
            stderr.print(f"{name}: {self.seconds[name]:.1f} s", highlight=False)
