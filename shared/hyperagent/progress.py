"""How a long function reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total) now and then; the function says in what unit."""


def no_progress(_done: int, _total: int) -> None:
    """Ignore the progress; the default of every function that reports it."""
