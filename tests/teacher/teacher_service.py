"""Test doubles for the service tests: an engine that waits for permits and a cache with a full disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from hyperagent.auth import BEARER
from hyperagent.cache.local import LocalCache
from hyperagent.cache.trajectory_writer import TrajectoryWriter
from hyperagent.errors import (
    StorageError,
)
from hyperagent.identity import TeacherIdentity, TokenizerIdentity
from hyperagent.topk import TopKRows
from hyperagent.wire.client import TeacherClient

TOKEN = "a-token"
METADATA = (("authorization", BEARER + TOKEN),)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
CANARY_ROWS = 7

Sequence = tuple[NDArray[np.uint32], NDArray[np.uint32]]
Serve = Callable[..., AbstractAsyncContextManager[TeacherClient]]


class GatedEngine:
    """A `ScoringEngine` that yields one uniform row per permit."""

    def __init__(self, identity: TeacherIdentity, *, permits: int, defect: Exception | None = None) -> None:
        self.identity = identity
        self.max_tokens = 2048
        self.permits = asyncio.Semaphore(permits)
        self.started = asyncio.Event()
        self.stopped = asyncio.Event()
        self.defect = defect
        self.progress = 0
        self.rows_per_step = 1
        self.restarts = 0

    async def score(
        self, _token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, top_k: int
    ) -> AsyncGenerator[TopKRows, None]:
        self.started.set()
        uniform = np.float32(-np.log(self.identity.vocab_size))
        tails = [np.log(self.identity.vocab_size - top_k) + uniform / t for t in self.identity.temperatures]
        try:
            for place in range(len(positions)):
                await self.permits.acquire()
                if self.defect:
                    raise self.defect
                self.progress += 1
                yield TopKRows(
                    positions[place : place + 1],
                    np.arange(top_k, dtype=np.uint32)[None],
                    np.full((1, top_k), uniform),
                    np.log1p(np.full(1, -top_k * np.exp(uniform), np.float32)),
                    np.full(1, uniform),
                    np.array([tails], np.float32),
                )
        finally:
            self.stopped.set()

    async def restart(self) -> None:
        self.restarts += 1
        self.permits = asyncio.Semaphore(10_000)

    def close(self) -> None:
        pass

    def forget_canary(self) -> None:
        self.started.clear()
        self.stopped.clear()


class FullDisk(LocalCache):
    """A cache whose disk is full."""

    def capture(self, *_args: object, **_options: object) -> TrajectoryWriter:
        raise StorageError("could not write the record: the disk is full")


OTHER = TokenizerIdentity("0" * 64, "1" * 64)


async def drained(generator: AsyncGenerator[Any, None]) -> list[Any]:
    async with aclosing(generator):
        return [item async for item in generator]


def assert_same_rows(left: TopKRows, right: TopKRows) -> None:
    for name in ("positions", "ids", "logprobs", "tail_logmass", "target_logprob", "tail_logsumexps"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


async def health_of(client: TeacherClient, service: str = "") -> int:
    async with grpc.aio.insecure_channel(client.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)
