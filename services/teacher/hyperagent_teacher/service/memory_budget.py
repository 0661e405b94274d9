"""The budget of bytes that the rows of all requests in progress share.

Use it only on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hyperagent.errors import LimitExceeded


class MemoryBudget:
    """A budget of bytes; callers wait in FIFO order when it is exhausted."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def held(self, num_bytes: int) -> AsyncIterator[None]:
        """Hold `num_bytes` of the budget inside the block, after waiting until they are free.

        Raises:
            LimitExceeded: `num_bytes` is more than the whole budget.
        """
        if num_bytes > self.limit_bytes:
            raise LimitExceeded(
                f"the request's rows take {num_bytes:,} bytes, but this teacher holds at most {self.limit_bytes:,} "
                "(--row-memory-mib); ask for fewer positions at once"
            )
        if self._waiting or self.held_bytes + num_bytes > self.limit_bytes:
            await self._wait(num_bytes)
        else:
            self.held_bytes += num_bytes
        try:
            yield
        finally:
            self.held_bytes -= num_bytes
            self._admit()

    async def _wait(self, num_bytes: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (num_bytes, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.held_bytes -= num_bytes
            else:
                self._waiting.remove(entry)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting and self.held_bytes + self._waiting[0][0] <= self.limit_bytes:
            num_bytes, turn = self._waiting.popleft()
            if turn.cancelled():
                continue
            self.held_bytes += num_bytes
            turn.set_result(None)
