"""Tests of published caches: reads return exactly what the cache holds, or fail."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from cache_rows import IDENTITY, TOKENS, filled, random_rows
from data_identity import data_identity

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.format.record import HEADER_BYTES
from hyperagent.cache.format.shard import shard_paths
from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.publish import publish
from hyperagent.cache.remote import RemoteCache, open_for_reading, read_identity
from hyperagent.errors import ConfigError, Conflict, CorruptRecord, IdentityMismatch, NotFound, StorageError
from hyperagent.topk import TopKRows

SETTINGS = CacheSettings(block_tokens=16)
DATA = data_identity(IDENTITY.tokenizer)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[LocalCache]:
    with LocalCache.create_or_open(tmp_path / "cache", IDENTITY, settings=SETTINGS, shard_bytes=4096) as cache:
        cache.record_data(DATA)
        yield cache


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}/cache" if request.param == "memory" else f"file://{tmp_path}/published"


def test_what_is_published_reads_like_the_cache(cache: LocalCache, url: str) -> None:
    keys = filled(cache, 12)
    assert publish(cache, url) > 0
    with open_for_reading(url) as published, open_for_reading(cache.root) as local:
        assert (type(published), type(local)) == (RemoteCache, LocalCache)
        assert published.identity == cache.identity == read_identity(url) == read_identity(cache.root)
        assert published.trajectory_keys() == cache.trajectory_keys() == sorted(keys)
        published.require_data(DATA)
        with pytest.raises(IdentityMismatch):
            published.require_data(replace(DATA, source="1" * 64))
        for key in keys:
            assert published.contains(key)
            assert published.is_intact(key)
            assert published.stored_digest(key) == cache.stored_digest(key)
            found, meant = published.get(key).rows, cache.get(key).rows
            for field in fields(TopKRows):
                np.testing.assert_array_equal(getattr(found, field.name), getattr(meant, field.name))
        assert not published.contains("0" * 64)
        assert not published.is_intact("0" * 64)
        with pytest.raises(NotFound, match="publish it again"):
            published.get("0" * 64)
        with pickle.loads(pickle.dumps(published)) as other:  # noqa: S301  # what multiprocessing does with what is ours
            assert other.trajectory_keys() == published.trajectory_keys()


def test_publishing_again_copies_what_is_new(cache: LocalCache, url: str) -> None:
    keys = filled(cache, 3)
    publish(cache, url)
    assert publish(cache, url) == 0
    more = cache.put(TOKENS + 50, random_rows(12, 8, seed=50))
    assert publish(cache, url) > 0
    with RemoteCache.open(url) as published:
        assert published.trajectory_keys() == sorted([*keys, more])
    # An interrupted upload is repeated.
    files, folder = fsspec.url_to_fs(url)
    (shard, *_) = sorted(files.glob(f"{folder}/shards/*.shard"))
    whole = files.cat_file(shard)
    files.pipe_file(shard, whole[:-1])
    with pytest.raises(CorruptRecord, match="does not end with a footer"):
        RemoteCache.open(url)
    publish(cache, url)
    with RemoteCache.open(url) as published:
        assert published.trajectory_keys() == sorted([*keys, more])


def test_damage_is_never_served(cache: LocalCache, url: str) -> None:
    (key,) = filled(cache, 1)
    publish(cache, url)
    meant = cache.get(key).rows
    files, folder = fsspec.url_to_fs(url)
    (shard,) = files.glob(f"{folder}/shards/*.shard")
    whole = files.cat_file(shard)
    detected = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0x20
        files.pipe_file(shard, bytes(damaged))
        try:
            with RemoteCache.open(url) as published:
                rows = published.get(key).rows
            np.testing.assert_array_equal(rows.logprobs, meant.logprobs)
            np.testing.assert_array_equal(rows.ids, meant.ids)
        except (CorruptRecord, NotFound):
            detected += 1
    # What remains is the shard's header, its digest, and padding between them and the footer.
    assert detected * 3 > 0.8 * len(whole)


@pytest.mark.parametrize("place", ["trajectory", "block"])
def test_one_flipped_bit_is_contained_but_not_intact_in_both_kinds_of_cache(
    cache: LocalCache, url: str, place: str
) -> None:
    damaged, whole = filled(cache, 2)
    publish(cache, url)
    record = bytes.fromhex(damaged) if place == "trajectory" else cache.trajectory(damaged).blocks[-1].key
    at = cache.index.find(record)
    assert at is not None
    (local,) = [path for path in shard_paths(cache.shards) if path.stem == at.shard]
    content = bytearray(local.read_bytes())
    content[at.offset + HEADER_BYTES] ^= 1
    local.write_bytes(content)
    files, folder = fsspec.url_to_fs(url)
    files.pipe_file(f"{folder}/shards/{local.name}", bytes(content))
    with LocalCache.open(cache.root) as local_cache, RemoteCache.open(url) as published:
        for reader in (local_cache, published):
            assert [reader.contains(key) for key in (damaged, whole)] == [True, True]
            assert [reader.is_intact(key) for key in (damaged, whole)] == [False, True]


def test_a_record_in_the_place_of_another_is_not_served(
    cache: LocalCache, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (cache.trajectory(key).blocks[0].key for key in filled(cache, 2))
    publish(cache, url)
    with RemoteCache.open(url) as published:
        place = published._at(other)
        monkeypatch.setattr(published, "_at", lambda _key: place)
        with pytest.raises(CorruptRecord, match=f"it is the record of another key, {other.hex()}; publish the cache"):
            published.record(one)


def test_what_is_not_there_or_another_cache_is_refused(cache: LocalCache, url: str, tmp_path: Path) -> None:
    filled(cache, 1)
    with pytest.raises(ConfigError, match="put one there with `hyperagent cache publish`"):
        RemoteCache.open(url)
    with pytest.raises(ConfigError, match="cannot be opened"):
        RemoteCache.open("nosuch://bucket/cache")
    publish(cache, url)
    with (
        LocalCache.create_or_open(tmp_path / "other", replace(IDENTITY, weights="9" * 64)) as other,
        pytest.raises(ConfigError, match="another cache is published at"),
    ):
        publish(other, url)


def test_a_cache_that_somebody_writes_is_not_published(cache: LocalCache, url: str) -> None:
    filled(cache, 1)
    with LocalCache.open(cache.root) as reader, pytest.raises(Conflict, match="publish when it has finished"):
        publish(reader, url)


def test_a_store_that_refuses(cache: LocalCache, tmp_path: Path) -> None:
    filled(cache, 1)
    (tmp_path / "in the way").write_bytes(b"")
    with pytest.raises(StorageError, match="check the address and your access rights"):
        publish(cache, f"file://{tmp_path}/in the way/cache")
