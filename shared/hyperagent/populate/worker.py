"""One worker: takes trajectories from the queue and has one teacher put their rows into its cache.

Failures are distinguished by their possible cause. A teacher that is full, starting or shutting down has not
begun: the item goes back. A call that breaks while an item is with the teacher counts as one of the item's tries,
since it may be the item that kills the teacher. An error that every item would meet ends the worker.
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
"""Pause before asking again a teacher that is full, or a queue whose items are all with others."""

_log = structlog.get_logger()


class Worker:
    """Empties a queue with one teacher, one trajectory at a time."""

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
        """Name the parts.

        Args:
            lease_s: the queue's; a claim is renewed three times within it.
            teacher_wait_s: how long a teacher that has gone may take to come back.
        """
        self._queue = queue
        self._tokens = tokens
        self._teacher = teacher
        self._data = data
        self._lease_s = lease_s
        self._teacher_wait_s = teacher_wait_s
        # In the order sent. The client may ask for the next trajectory before the answer to the last is looked at.
        self._claims: deque[Claim] = deque()
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    async def run(self) -> None:
        """Work until everything in the queue is over.

        Raises:
            ServiceError: the teacher is gone for too long, or the queue is.
            IdentityMismatch, ConfigError, StorageError: the teacher refuses everything.
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
        """Send trajectories until there is none to claim, or the call fails."""
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
            _log.info("the teacher takes nothing now", teacher=self._teacher.address, reason=str(error))
            await self._release()
        except (ServiceError, CorruptRecord) as error:
            # The teacher works on one trajectory at a time, so a second one has not been begun.
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
