"""The hot tier may be down, slow, full, flushed, wrong or killed: reads go on from disk."""

from __future__ import annotations

import pickle
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from cache_rows import IDENTITY, TOKENS, random_rows

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.hot_tier import HotTier, HotTierStats
from hyperagent.cache.local import LocalCache
from hyperagent.errors import ConfigError

ROWS = random_rows(4, 8)
Handler = Callable[[socket.socket, threading.Event], None]


def opened(root: Path, hot: HotTier, codec: str = "exact") -> tuple[LocalCache, str]:
    cache = LocalCache.create_or_open(root, IDENTITY, settings=CacheSettings(codec=codec), hot=hot)
    key = cache.put(TOKENS, ROWS)
    hot.flush()
    return cache, key


def assert_read(cache: LocalCache, key: str) -> None:
    np.testing.assert_array_equal(np.sort(cache.get(key).rows.ids), np.sort(ROWS.ids))


def test_a_block_is_read_from_redis_and_expires(tmp_path: Path, redis_server: Any) -> None:
    hot = HotTier.connect(redis_server.url, ttl_s=60)
    cache, key = opened(tmp_path, hot)
    assert_read(cache, key)
    assert (hot.hits, hot.misses, hot.errors) == (1, 0, 0)
    with redis.Redis.from_url(redis_server.url) as client:
        (name,) = client.keys()
        assert name.decode().startswith("hyperagent:topk:")
        assert name.decode().endswith(cache.trajectory(key).blocks[0].key.hex())
        assert 0 < client.ttl(name) <= 60
        client.flushall()
        assert_read(cache, key)
        assert (hot.hits, hot.misses) == (1, 1)
        hot.flush()
        assert client.keys() == [name]
    assert_read(cache, key)
    assert hot.hits == 2
    cache.close()


def test_what_it_was_good_for_is_told(tmp_path: Path, redis_server: Any) -> None:
    with LocalCache.create_or_open(tmp_path / "without", IDENTITY) as without:
        assert_read(without, without.put(TOKENS, ROWS))
        assert without.hot_tier_stats == HotTierStats(0, 0, False)
    hot = HotTier.connect(redis_server.url)
    cache, key = opened(tmp_path / "with", hot)
    assert_read(cache, key)
    earlier = cache.hot_tier_stats
    assert earlier == HotTierStats(1, 0, False)
    with redis.Redis.from_url(redis_server.url) as client:
        client.setrange(client.keys()[0], 150, b"\xff" * 8)
        assert_read(cache, key)
        assert cache.hot_tier_stats.since(earlier) == HotTierStats(0, 1, False)
        redis_server.kill()
    assert_read(cache, key)
    # What is found to be damaged while Redis is left alone stays there, until it expires.
    hot.drop("x")
    assert cache.hot_tier_stats.since(earlier) == HotTierStats(-1, 3, True)
    cache.close()


def test_another_process_connects_for_itself(tmp_path: Path, redis_server: Any) -> None:
    cache, key = opened(tmp_path, HotTier.connect(redis_server.url))
    with pickle.loads(pickle.dumps(cache)) as other:  # noqa: S301  # what multiprocessing does with what is ours
        assert_read(other, key)
        assert other.hot_tier_stats == HotTierStats(1, 0, False)
    assert cache.hot_tier_stats == HotTierStats(0, 0, False)
    cache.close()


def test_caches_that_store_rows_differently_share_a_redis_without_mixing(tmp_path: Path, redis_server: Any) -> None:
    for codec in ("exact", "archive"):
        cache, key = opened(tmp_path / codec, HotTier.connect(redis_server.url), codec)
        assert_read(cache, key)
        cache.close()
    with redis.Redis.from_url(redis_server.url) as client:
        assert len(client.keys()) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "of another key", "another type", "empty"])
def test_a_wrong_value_is_not_served(tmp_path: Path, redis_server: Any, damage: str) -> None:
    hot = HotTier.connect(redis_server.url)
    cache, key = opened(tmp_path, hot)
    cache.put(TOKENS + 1, ROWS)
    hot.flush()
    with redis.Redis.from_url(redis_server.url) as client:
        block = cache.trajectory(key).blocks[0].key.hex().encode()
        name, other = sorted(client.keys(), key=lambda name: block not in name)
        whole = client.get(name)
        client.delete(name)
        match damage:
            case "cut":
                client.set(name, whole[:-1])
            case "flipped":
                client.set(name, whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
            case "of another key":
                client.set(name, client.get(other))
            case "another type":
                client.lpush(name, "x")
            case "empty":
                client.set(name, b"")
        assert_read(cache, key)
        hot.flush()
        assert client.get(name) == whole
    assert hot.errors == 0
    cache.close()


def test_a_redis_killed_in_the_middle_is_left_alone(tmp_path: Path, redis_server: Any) -> None:
    hot = HotTier.connect(redis_server.url)
    cache, key = opened(tmp_path, hot)
    assert_read(cache, key)
    redis_server.kill()
    for _ in range(5):
        assert_read(cache, key)
    # The breaker: one error, and Redis is not asked again for a while.
    assert (hot.errors, hot.is_degraded) == (1, True)
    cache.put(TOKENS + 1, ROWS)
    assert hot.not_kept > 0
    cache.close()


def test_a_redis_that_never_was_up_hurts_nobody(tmp_path: Path) -> None:
    hot = HotTier.connect("redis://127.0.0.1:1/0")
    cache, key = opened(tmp_path, hot)
    assert_read(cache, key)
    assert hot.errors >= 1
    cache.close()


def test_a_redis_without_memory_keeps_nothing_and_breaks_nothing(tmp_path: Path, redis_server: Any) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        hot = HotTier.connect(redis_server.url)
        cache, key = opened(tmp_path, hot)
        assert_read(cache, key)
        assert hot.errors >= 1
        assert client.keys() == []
    cache.close()


@contextmanager
def server(handle: Handler) -> Iterator[str]:
    """Something that listens where a Redis should."""
    over = threading.Event()

    class Answerer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                handle(self.request, over)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answerer) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"redis://127.0.0.1:{listening.server_address[1]}/0"
        over.set()
        listening.shutdown()
        thread.join()


def silent(_connection: socket.socket, over: threading.Event) -> None:
    over.wait()


def dripping(connection: socket.socket, over: threading.Event) -> None:
    """Never silent for long, and never done."""
    connection.sendall(b"$")
    while not over.wait(0.05):
        connection.sendall(b"1")


def no_redis(connection: socket.socket, _over: threading.Event) -> None:
    connection.recv(1)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def wrong_answers(connection: socket.socket, _over: threading.Event) -> None:
    while connection.recv(1 << 16):
        connection.sendall(b":7\r\n" * 8)


@pytest.mark.parametrize("handle", [silent, dripping, no_redis, wrong_answers])
def test_whatever_answers_costs_half_a_second_and_no_more(tmp_path: Path, handle: Handler) -> None:
    with server(handle) as url:
        hot = HotTier.connect(url)
        cache = LocalCache.create_or_open(tmp_path, IDENTITY, hot=hot)
        key = cache.put(TOKENS, ROWS)
        started = time.monotonic()
        for _ in range(3):
            assert_read(cache, key)
        assert time.monotonic() - started < 5
        assert hot.errors >= 1
        assert hot.is_degraded
        cache.close()


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="the Redis URL is invalid") as refusal:
        HotTier.connect("localhost://:secret@h:6379")
    assert "secret" not in str(refusal.value)
