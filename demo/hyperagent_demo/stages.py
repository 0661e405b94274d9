"""The stages of the demo: each timed, and shown with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import Progress, TaskID

from hyperagent.cli.display import stderr


class Bar:
    """One stage's progress bar."""

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
        """One stage, timed from here to the end of the block."""
        task = self._bars.add_task(name, total=total, note="")
        started = time.monotonic()
        yield Bar(self._bars, task)
        self.seconds[name] = round(time.monotonic() - started, 2)
        total = self._bars.tasks[self._bars.task_ids.index(task)].total or 1
        self._bars.update(task, completed=total, total=total)
        if not stderr.is_terminal:
            # Bars are drawn once, at the end, where there is no terminal: a log gets a line per stage instead.
            stderr.print(f"{name}: {self.seconds[name]:.1f} s", highlight=False)
