"""Check that the engine makes progress, which a running process does not prove.

An engine that makes progress is alive. An engine without progress for a while gets a canary; if the canary does not
finish within the timeout either, the engine hangs, and the teacher accepts no request until it makes progress again. An
engine that keeps hanging is restarted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from hyperagent.errors import HyperagentError
from hyperagent_teacher.engines.base import ScoringEngine
from hyperagent_teacher.service.canary import score_canary

_log = structlog.get_logger()


class Watchdog:
    """Watches the progress of one engine."""

    def __init__(self, engine: ScoringEngine, *, timeout_s: float, restart_after_s: float) -> None:
        """Prepare to watch the engine.

        Args:
            timeout_s: seconds that an engine with work may make no progress before it counts as hanging.
            restart_after_s: seconds that the engine may hang before it is restarted.
        """
        self._engine = engine
        self._timeout_s = timeout_s
        self._restart_after_s = restart_after_s
        self._canary: asyncio.Task[None] | None = None

    async def watch(self, on_change: Callable[[bool], Awaitable[None]]) -> None:
        """Watch until cancelled; `on_change` is called with whether the engine is alive, on every change.

        Raises:
            ServiceError: the engine hangs, or has stopped, and cannot be restarted.
        """
        clock = asyncio.get_running_loop().time
        is_alive, moved_at, progress = True, clock(), self._engine.progress
        try:
            while True:
                await asyncio.sleep(min(1.0, self._timeout_s / 10))
                if self._engine.progress != progress:
                    moved_at, progress = clock(), self._engine.progress
                still_s = clock() - moved_at
                has_failed = self._check_canary(still_s)
                if is_alive != (alive := not has_failed and still_s <= self._timeout_s):
                    is_alive = alive
                    _log.warning("the engine moves again" if alive else "the engine does not answer")
                    await on_change(is_alive)
                if has_failed or still_s > self._timeout_s + self._restart_after_s:
                    await self._restart()
                    moved_at, progress = clock(), self._engine.progress - 1
        finally:
            await self._drop_canary()

    def _check_canary(self, still_s: float) -> bool:
        """Send a canary to an engine without progress; return whether one has failed."""
        if self._canary is not None and self._canary.done():
            error = self._canary.exception()
            self._canary = None
            if error is not None:
                _log.warning("the canary failed", reason=str(error))
                return True
        if self._canary is None and still_s > self._timeout_s / 4:
            self._canary = asyncio.create_task(score_canary(self._engine))
        return False

    async def _restart(self) -> None:
        _log.warning("restarting the engine")
        await self._drop_canary()
        await self._engine.restart()
        await score_canary(self._engine)

    async def _drop_canary(self) -> None:
        if self._canary is not None:
            self._canary.cancel()
            with suppress(asyncio.CancelledError, HyperagentError):
                await self._canary
            self._canary = None
