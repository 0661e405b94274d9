"""Admission of requests: none before the teacher is ready or while it shuts down, and a bounded number at once.

Use it only on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hyperagent.errors import Busy, NotServing


class Admission:
    """Counts the requests in progress; closed at first."""

    def __init__(self, *, max_pending_requests: int) -> None:
        self.max_pending_requests = max_pending_requests
        self.pending = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._closed_because = "it is starting"

    def open(self) -> None:
        """Accept requests."""
        self._closed_because = ""

    def close(self, because: str) -> None:
        """Refuse new requests; those in progress continue."""
        self._closed_because = because

    def require_open(self) -> None:
        """Refuse to begin anything while closed.

        Raises:
            NotServing: the teacher is starting or shutting down.
        """
        if self._closed_because:
            raise NotServing(f"the teacher accepts no requests: {self._closed_because}; try again later")

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one request's slot inside the block.

        Raises:
            NotServing: see `require_open`.
            Busy: all slots are taken.
        """
        self.require_open()
        if self.pending >= self.max_pending_requests:
            raise Busy(
                f"the teacher already holds {self.pending} requests, the maximum it accepts (--max-pending-requests); "
                "try again later"
            )
        self.pending += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.pending -= 1
            if not self.pending:
                self._empty.set()

    async def wait_until_empty(self, timeout_s: float) -> None:
        """Return when no request is in progress any more, or after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
