"""The hot tier may be down, flushed, wrong or killed: reads go on from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from cache_rows import IDENTITY, random_rows

from hyperagent.cache.hot import HotTier
from hyperagent.cache.store import TopKCache
from hyperagent.errors import ConfigError

TOKENS = np.arange(30, dtype=np.uint32)


def filled(root: Path, hot: HotTier) -> tuple[TopKCache, str]:
    cache = TopKCache.create_or_open(root, IDENTITY, hot=hot)
    rows = random_rows(4, 8)
    key = cache.key(TOKENS, rows.positions)
    cache.put(key, rows, num_tokens=30)
    return cache, key


def test_a_record_is_read_from_redis_and_expires(tmp_path: Path, redis_server: Any) -> None:
    hot = HotTier.connect(redis_server.url, ttl_s=60)
    cache, key = filled(tmp_path, hot)
    cache.get(key)
    assert (hot.hits, hot.errors) == (1, 0)
    with redis.Redis.from_url(redis_server.url) as client:
        assert 0 < client.ttl(f"hyperagent:topk:{key}") <= 60
        client.flushall()
    assert cache.get(key).num_tokens == 30
    assert hot.misses == 1
    cache.get(key)
    assert hot.hits == 2
    hot.close()


def test_a_damaged_copy_is_dropped_and_the_disk_read(tmp_path: Path, redis_server: Any) -> None:
    hot = HotTier.connect(redis_server.url, ttl_s=60)
    cache, key = filled(tmp_path, hot)
    with redis.Redis.from_url(redis_server.url) as client:
        name = f"hyperagent:topk:{key}"
        whole = client.get(name)
        client.set(name, whole[:-1])
        np.testing.assert_array_equal(cache.get(key).rows.ids, random_rows(4, 8).ids)
        assert client.get(name) == whole
    hot.close()


def test_a_redis_killed_in_the_middle_is_left_alone(tmp_path: Path, redis_server: Any) -> None:
    hot = HotTier.connect(redis_server.url, ttl_s=60)
    cache, key = filled(tmp_path, hot)
    cache.get(key)
    redis_server.kill()
    for _ in range(5):
        assert cache.get(key).rows.num_rows == 4
    # The breaker: one error, and Redis is not asked again for a while.
    assert hot.errors == 1
    hot.close()


def test_a_redis_that_never_was_up_hurts_nobody(tmp_path: Path) -> None:
    hot = HotTier.connect("redis://127.0.0.1:1/0", ttl_s=60)
    cache, key = filled(tmp_path, hot)
    assert cache.get(key).rows.num_rows == 4
    assert hot.errors == 1
    hot.close()


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="the Redis URL is wrong") as refusal:
        HotTier.connect("localhost://:secret@h:6379")
    assert "secret" not in str(refusal.value)
