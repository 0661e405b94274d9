"""A request to stop that a signal handler can make."""

from __future__ import annotations


class StopRequest:
    """Set once, by a signal handler, and asked for between two steps.

    `threading.Event` would not do: its `set` takes a lock, and a signal that arrives while the main thread holds this lock
    would wait for itself.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set
