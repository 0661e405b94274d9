"""The hot tier: a Redis that holds copies of records, and may lose, damage, delay or refuse any of them at any time.

Nothing depends on it. A read has one deadline over all of it, so a Redis that answers byte by byte costs no more than
one that is silent; a write is handed over and never waited for. An error opens a circuit breaker, and Redis is not asked for a
while. What it answers is checked by the reader like what the disk answers.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import redis.asyncio
import structlog
from redis.exceptions import RedisError

from hyperagent.errors import ConfigError

_TIMEOUT_S = 0.5
_BREAKER_S = 10.0
_VALUES_PER_CALL = 16
_MOST_WAITING_BYTES = 64 << 20
DEFAULT_TTL_S = 86_400
_T = TypeVar("_T")
log = structlog.get_logger()


class HotTierStats(NamedTuple):
    """What a hot tier was good for."""

    hits: int = 0
    misses: int = 0
    """Values that it did not have, or did not give in time."""
    is_degraded: bool = False
    """Whether the circuit breaker is open."""

    def since(self, earlier: HotTierStats) -> HotTierStats:
        """What has come after `earlier`."""
        return HotTierStats(self.hits - earlier.hits, self.misses - earlier.misses, self.is_degraded)


class HotTier:
    """Bytes by name, best effort; no method raises or takes longer than half a second. Safe to use from several threads."""

    def __init__(self, url: str, client: redis.asyncio.Redis, *, ttl_s: int) -> None:
        """Use `connect`."""
        self._url = url
        self._client = client
        self._ttl_s = ttl_s
        self._left_alone_until = 0.0
        self._waiting_bytes = 0
        self.hits = 0
        self.misses = 0
        self.errors = 0
        self.not_kept = 0
        """Values that were not written, because Redis is slow or the circuit breaker is open."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hot-tier", daemon=True)
        self._thread.start()

    @classmethod
    def connect(cls, url: str, *, ttl_s: int = DEFAULT_TTL_S) -> HotTier:
        """Name a Redis, such as "redis://localhost:6379/0"; it need not be up.

        Args:
            ttl_s: seconds until Redis forgets a record. How much Redis holds is bounded by its own `maxmemory`.

        Raises:
            ConfigError: `url` is not a Redis URL.
        """
        try:
            client = redis.asyncio.Redis.from_url(
                url, protocol=3, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
            )
        except ValueError as error:
            # Neither the address nor the reason is shown: both may quote a password.
            raise ConfigError("the Redis URL is wrong; give one like redis://127.0.0.1:6379/0") from error
        return cls(url, client, ttl_s=ttl_s)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process connects for itself."""
        return _reconnect, (self._url, self._ttl_s)

    @property
    def is_degraded(self) -> bool:
        """Whether the circuit breaker is open: Redis is not asked for a while."""
        return time.monotonic() < self._left_alone_until

    @property
    def use(self) -> HotTierStats:
        """What it was good for until now."""
        return HotTierStats(self.hits, self.misses, self.is_degraded)

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        """The bytes under each name, where Redis has them and answers in time."""
        answer = None if self.is_degraded else self._wait(self._guarded(self._get(names), _TIMEOUT_S))
        found = answer or [None] * len(names)
        self.hits += sum(value is not None for value in found)
        self.misses += sum(value is None for value in found)
        return found

    def put(self, values: Mapping[str, bytes]) -> None:
        """Keep copies, if Redis will; returns at once."""
        size = sum(map(len, values.values()))
        if self.is_degraded or self._waiting_bytes + size > _MOST_WAITING_BYTES:
            self.not_kept += len(values)
            return
        self._waiting_bytes += size
        future = asyncio.run_coroutine_threadsafe(self._guarded(self._put(values), 4 * _TIMEOUT_S), self._loop)
        future.add_done_callback(lambda _: self._has_been_put(size))

    def drop(self, name: str) -> None:
        """Forget what `get` found under `name`, because it is damaged; returns at once."""
        self.hits -= 1
        self.misses += 1
        if not self.is_degraded:
            asyncio.run_coroutine_threadsafe(self._guarded(self._drop(name), _TIMEOUT_S), self._loop)

    def flush(self, timeout_s: float = 2.0) -> None:
        """Wait until what was put has been written, or refused."""
        end = time.monotonic() + timeout_s
        while self._waiting_bytes and time.monotonic() < end:
            time.sleep(0.001)

    def close(self) -> None:
        """Close the connections."""
        self._wait(self._guarded(self._client.aclose(), _TIMEOUT_S))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _get(self, names: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for start in range(0, len(names), _VALUES_PER_CALL):
            part = names[start : start + _VALUES_PER_CALL]
            answer = await self._client.mget(part)
            if not isinstance(answer, list) or len(answer) != len(part):
                raise RedisError("MGET was answered with something else than its values")
            found.extend(value if isinstance(value, bytes) else None for value in answer)
        return found

    async def _drop(self, name: str) -> None:
        await self._client.delete(name)

    async def _put(self, values: Mapping[str, bytes]) -> None:
        # Not atomic: each value is independent of the others.
        pipeline = self._client.pipeline(transaction=False)
        for name, value in values.items():
            pipeline.set(name, value, ex=self._ttl_s)
        await pipeline.execute()

    async def _guarded(self, action: Coroutine[Any, Any, _T], timeout_s: float) -> _T | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await action
        except (RedisError, OSError, TimeoutError, KeyError, TypeError, ValueError) as error:
            # Also of another type than Redis' own: whatever answers at this address need not be a Redis.
            if not self.is_degraded:
                log.warning(
                    "hot tier not used for a while, the disk is",
                    seconds=_BREAKER_S,
                    error=str(error) or "no answer in time",
                )
            self.errors += 1
            self._left_alone_until = time.monotonic() + _BREAKER_S
            # What is left of a late answer must not be taken for that of the next question.
            with suppress(RedisError, OSError, TimeoutError):
                await self._client.connection_pool.disconnect()
            return None

    def _wait(self, action: Coroutine[Any, Any, _T]) -> _T | None:
        future: Future[_T | None] = asyncio.run_coroutine_threadsafe(action, self._loop)
        return future.result()

    def _has_been_put(self, size: int) -> None:
        self._waiting_bytes -= size


def _reconnect(url: str, ttl_s: int) -> HotTier:
    return HotTier.connect(url, ttl_s=ttl_s)
