"""The hot tier: a Redis that holds copies of records, and may lose, damage or refuse any of them at any time.

Nothing depends on it. An error opens a breaker, and Redis is left alone for a while; what it answers is checked by
the reader like what the disk answers.
"""

from __future__ import annotations

import time

import redis
import structlog

from hyperagent.errors import ConfigError

_TIMEOUT_S = 0.5
_BREAKER_S = 10.0
DEFAULT_TTL_S = 86_400
log = structlog.get_logger()


class HotTier:
    """Records by key, best effort; no method raises."""

    def __init__(self, client: redis.Redis, *, ttl_s: int) -> None:
        self._client = client
        self._ttl_s = ttl_s
        self._closed_until = 0.0
        self.hits = 0
        self.misses = 0
        self.errors = 0

    @classmethod
    def connect(cls, url: str, *, ttl_s: int = DEFAULT_TTL_S) -> HotTier:
        """Name a Redis, such as "redis://localhost:6379/0"; it need not be up.

        Args:
            ttl_s: seconds until Redis forgets a record.

        Raises:
            ConfigError: `url` is not a Redis URL.
        """
        try:
            client = redis.Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
        except ValueError as error:
            # Neither the address nor the reason is shown: both may quote a password.
            raise ConfigError("the Redis URL is wrong; give one like redis://127.0.0.1:6379/0") from error
        return cls(client, ttl_s=ttl_s)

    def get(self, key: str) -> bytes | None:
        """The bytes under `key`, if Redis has them and answers."""
        if not self._is_tried():
            return None
        try:
            content = self._client.get(_name(key))
        except redis.RedisError as error:
            self._leave_alone(error)
            return None
        if isinstance(content, bytes):
            self.hits += 1
            return content
        self.misses += 1
        return None

    def put(self, key: str, content: bytes) -> None:
        """Keep a copy of `content`, if Redis will."""
        if self._is_tried():
            try:
                self._client.set(_name(key), content, ex=self._ttl_s)
            except redis.RedisError as error:
                self._leave_alone(error)

    def drop(self, key: str) -> None:
        """Forget what is under `key`."""
        if self._is_tried():
            try:
                self._client.delete(_name(key))
            except redis.RedisError as error:
                self._leave_alone(error)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _is_tried(self) -> bool:
        return time.monotonic() >= self._closed_until

    def _leave_alone(self, error: redis.RedisError) -> None:
        self.errors += 1
        self._closed_until = time.monotonic() + _BREAKER_S
        log.warning("hot tier left alone, disk is used", seconds=_BREAKER_S, error=str(error))


def _name(key: str) -> str:
    # The key is a digest that covers the teacher's fingerprint, so one Redis can serve many caches.
    return f"hyperagent:topk:{key}"
