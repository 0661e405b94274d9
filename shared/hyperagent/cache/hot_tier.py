"""Hot tier: an optional Redis with copies of records, which may lose, damage, delay or refuse any of them at any time.

Correctness never depends on it. A read has a single deadline, so a Redis that answers byte by byte costs no more than
one that does not answer; writes happen in the background. An error opens a circuit breaker, which pauses the use of
Redis for a while. The reader checks values from Redis exactly like bytes from disk.
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
    """Usage counts of a hot tier."""

    hits: int = 0
    misses: int = 0
    """Number of values that Redis did not have or did not return in time."""
    is_degraded: bool = False
    """Whether the circuit breaker is open."""

    def since(self, earlier: HotTierStats) -> HotTierStats:
        """Return the difference between these counts and `earlier`."""
        return HotTierStats(self.hits - earlier.hits, self.misses - earlier.misses, self.is_degraded)


class HotTier:
    """Best-effort store of bytes by name; thread-safe; no method raises or takes longer than half a second."""

    def __init__(self, url: str, client: redis.asyncio.Redis, *, ttl_s: int) -> None:
        """Initialize from a Redis client; use `connect` instead."""
        self._url = url
        self._client = client
        self._ttl_s = ttl_s
        self._left_alone_until = 0.0
        self._waiting_bytes = 0
        self.hits = 0
        self.misses = 0
        self.errors = 0
        self.not_kept = 0
        """Number of values not written because Redis is slow or the circuit breaker is open."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hot-tier", daemon=True)
        self._thread.start()

    @classmethod
    def connect(cls, url: str, *, ttl_s: int = DEFAULT_TTL_S) -> HotTier:
        """Create a hot tier for a Redis URL such as "redis://localhost:6379/0"; the server need not be running.

        Args:
            ttl_s: seconds until a record expires. The memory that Redis uses is bounded by its own `maxmemory`.

        Raises:
            ConfigError: `url` is not a Redis URL.
        """
        try:
            client = redis.asyncio.Redis.from_url(
                url, protocol=3, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
            )
        except ValueError as error:
            # Neither the URL nor the reason is shown, because both may contain a password.
            raise ConfigError("the Redis URL is invalid; use one like redis://127.0.0.1:6379/0") from error
        return cls(url, client, ttl_s=ttl_s)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings only; another process opens its own connection."""
        return _reconnect, (self._url, self._ttl_s)

    @property
    def is_degraded(self) -> bool:
        """Whether the circuit breaker is open, so that Redis is not used for a while."""
        return time.monotonic() < self._left_alone_until

    @property
    def use(self) -> HotTierStats:
        """Usage counts until now."""
        return HotTierStats(self.hits, self.misses, self.is_degraded)

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        """Return the bytes under each name, or None where Redis lacks them or does not answer in time."""
        answer = None if self.is_degraded else self._wait(self._guarded(self._get(names), _TIMEOUT_S))
        found = answer or [None] * len(names)
        self.hits += sum(value is not None for value in found)
        self.misses += sum(value is None for value in found)
        return found

    def put(self, values: Mapping[str, bytes]) -> None:
        """Store copies in the background; return at once."""
        size = sum(map(len, values.values()))
        if self.is_degraded or self._waiting_bytes + size > _MOST_WAITING_BYTES:
            self.not_kept += len(values)
            return
        self._waiting_bytes += size
        future = asyncio.run_coroutine_threadsafe(self._guarded(self._put(values), 4 * _TIMEOUT_S), self._loop)
        future.add_done_callback(lambda _: self._has_been_put(size))

    def drop(self, name: str) -> None:
        """Delete the damaged value that `get` found under `name` in the background; return at once."""
        self.hits -= 1
        self.misses += 1
        if not self.is_degraded:
            asyncio.run_coroutine_threadsafe(self._guarded(self._drop(name), _TIMEOUT_S), self._loop)

    def flush(self, timeout_s: float = 2.0) -> None:
        """Wait until pending writes have succeeded or failed."""
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
                raise RedisError("Redis answered MGET with an invalid reply")
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
            # Includes errors other than Redis' own, because the server at this address may not be a Redis.
            if not self.is_degraded:
                log.warning(
                    "hot tier paused, reading from disk",
                    seconds=_BREAKER_S,
                    error=str(error) or "no answer in time",
                )
            self.errors += 1
            self._left_alone_until = time.monotonic() + _BREAKER_S
            # The rest of a late reply must not be read as the reply to the next command.
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
