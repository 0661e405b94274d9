"""Worker that takes trajectories from the queue and has one teacher write their rows into its cache.

Failures are distinguished by their possible cause. If the teacher is full, starting or shutting down, it has not begun
and the item is given back. A call that breaks while the teacher has an item counts as one of the item's tries, since
the item itself may crash the teacher. An error that affects every item ends the worker.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

import structlog

from hyperagent.data.files.tokens_file import TokensFile
from hyperagent.errors import Busy, CorruptRecord, NotServing, ServiceError
from hyperagent.identity import DataIdentity
from hyperagent.populate.queue import Claim, Finished, WorkQueue
from hyperagent.wire.client import TeacherClient, Trajectory

_IDLE_S = 0.5
"""Pause in seconds before retrying a teacher that is full, or a queue whose items are all claimed."""

_log = structlog.get_logger()


class Worker:
    """Process a queue with one teacher, one trajectory at a time."""

    def __init__(
        self,
        queue: WorkQueue,
        tokens: TokensFile,
        teacher: TeacherClient,
        data: DataIdentity,
        *,
        lease_s: float,
        teacher_wait_s: float,
    ) -> None:
        """Initialize the worker.

        Args:
            lease_s: lease of the queue in seconds; a claim is renewed three times within it.
            teacher_wait_s: seconds to wait for a lost teacher to come back.
        """
        self._queue = queue
        self._tokens = tokens
        self._teacher = teacher
        self._data = data
        self._lease_s = lease_s
        self._teacher_wait_s = teacher_wait_s
        # In the order sent. The client may request the next trajectory before the last answer is processed.
        self._claims: deque[Claim] = deque()
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    async def run(self) -> None:
        """Work until every item in the queue is finished or quarantined.

        Raises:
            ServiceError: the teacher or the queue has been unavailable for too long.
            IdentityMismatch, ConfigError, StorageError: the teacher refuses every item.
        """
        async with self._renewing():
            try:
                while not (await asyncio.to_thread(self._queue.counts)).is_over:
                    await self._teacher.wait_until_serving(self._teacher_wait_s)
                    await self._one_call()
                    await asyncio.sleep(_IDLE_S)
            finally:
                await self._release()

    async def _one_call(self) -> None:
        """Send trajectories until there are none to claim or the call fails."""
        try:
            async with aclosing(self._teacher.populate(self._claimed(), data=self._data)) as outcomes:
                async for outcome in outcomes:
                    claim = self._claims.popleft()
                    if outcome.trajectory_id != claim.item.trajectory_id:
                        self._claims.appendleft(claim)
                        raise ServiceError(
                            f"the teacher at {self._teacher.address} answers for {outcome.trajectory_id!r} when asked for "
                            f"{claim.item.trajectory_id!r}"
                        )
                    finished = Finished(
                        claim.item, outcome.outcome, outcome.reason, outcome.cache_key, outcome.record_digest
                    )
                    await asyncio.to_thread(self._queue.finish, claim, finished)
        except (Busy, NotServing) as error:
            _log.info("teacher accepts no trajectories now", teacher=self._teacher.address, reason=str(error))
            await self._release()
        except (ServiceError, CorruptRecord) as error:
            # The teacher processes one trajectory at a time, so the others have not been started.
            if self._claims:
                claim = self._claims.popleft()
                if await asyncio.to_thread(self._queue.fail, claim, str(error)):
                    _log.error("trajectory quarantined", trajectory=claim.item.trajectory_id, reason=str(error))
            await self._release()

    async def _claimed(self) -> AsyncIterator[Trajectory]:
        while (claim := await asyncio.to_thread(self._queue.claim, self.name)) is not None:
            self._claims.append(claim)
            row = await asyncio.to_thread(self._tokens.row, claim.item.row)
            yield row.trajectory_id, row.token_ids, row.positions

    async def _release(self) -> None:
        while self._claims:
            await asyncio.to_thread(self._queue.give_back, self._claims.popleft())

    @asynccontextmanager
    async def _renewing(self) -> AsyncIterator[None]:
        async def renew() -> None:
            while True:
                await asyncio.sleep(self._lease_s / 3)
                for claim in tuple(self._claims):
                    await asyncio.to_thread(self._queue.renew, claim)

        task = asyncio.create_task(renew())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
