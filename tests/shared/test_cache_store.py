"""The cache on disk: what is put is there once, whole, and of one teacher."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog
from cache_rows import IDENTITY, random_rows
from data_identity import data_identity

from hyperagent.cache.store import TopKCache
from hyperagent.errors import (
    ConfigError,
    CorruptRecord,
    IdentityMismatch,
    InvalidRequest,
    NotFound,
    StorageError,
)
from hyperagent.identity import DataIdentity, TeacherIdentity, TokenizerIdentity

TOKENS = np.arange(30, dtype=np.uint32)


def filled(root: Path, count: int = 3) -> tuple[TopKCache, list[str]]:
    cache = TopKCache.create_or_open(root, IDENTITY)
    keys = []
    for number in range(count):
        rows = random_rows(4 + number, 8, seed=number)
        key = cache.key(TOKENS + number, rows.positions)
        cache.put(key, rows, num_tokens=30)
        keys.append(key)
    return cache, keys


def path_of(root: Path, key: str) -> Path:
    return root / "objects" / key[:2] / f"{key}.topk"


def test_put_get_contains_and_iterate(tmp_path: Path) -> None:
    _, keys = filled(tmp_path)
    cache = TopKCache.open(tmp_path)
    assert cache.identity == IDENTITY
    assert list(cache.keys()) == sorted(keys)
    assert [key for key, _ in cache] == sorted(keys)
    assert all(cache.contains(key) for key in keys)
    record = cache.get(keys[1])
    np.testing.assert_array_equal(record.rows.ids, random_rows(5, 8, seed=1).ids)
    assert not cache.contains("00" * 32)
    with pytest.raises(NotFound, match="has no record 0000"):
        cache.get("00" * 32)
    stats = cache.stats()
    assert (stats.records, stats.supervised_tokens, stats.context_tokens, stats.top_k) == (3, 15, 90, 8)
    assert stats.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.topk"))
    assert stats.bytes_per_token == stats.bytes / 15


def test_a_key_covers_teacher_tokens_and_positions(tmp_path: Path) -> None:
    cache = TopKCache.create_or_open(tmp_path / "a", IDENTITY)
    other = TopKCache.create_or_open(tmp_path / "b", replace(IDENTITY, weights="9" * 64))
    positions = np.array([3, 5], np.uint32)
    key = cache.key(TOKENS, positions)
    assert key == cache.key(TOKENS.copy(), positions.copy())
    changed = [
        other.key(TOKENS, positions),
        cache.key(TOKENS[:-1], positions),
        cache.key(TOKENS[::-1].copy(), positions),
        cache.key(TOKENS, positions[:1]),
        # The same bytes, cut elsewhere.
        cache.key(np.append(TOKENS, 3).astype(np.uint32), positions[1:]),
    ]
    assert len({key, *changed}) == 1 + len(changed)


def test_one_cache_one_teacher(tmp_path: Path) -> None:
    filled(tmp_path)
    assert TopKCache.create_or_open(tmp_path, replace(IDENTITY, model="renamed")).identity == IDENTITY
    with pytest.raises(IdentityMismatch, match=r"dtype=float32.*dtype=bfloat16.*folder of its own"):
        TopKCache.create_or_open(tmp_path, replace(IDENTITY, dtype="bfloat16"))
    with pytest.raises(ConfigError, match="there is no cache"):
        TopKCache.open(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "refusal"),
    [
        (b"[]", CorruptRecord),
        (b"null", CorruptRecord),
        (b'{"format_version": 1}', CorruptRecord),
        (b'{"format_version": 1, "identity": {"x": 1}, "fingerprint": ""}', CorruptRecord),
        (b"\xff", CorruptRecord),
        (b'{"format_version": 2}', ConfigError),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, damage: bytes, refusal: type[Exception]) -> None:
    filled(tmp_path)
    (tmp_path / "manifest.json").write_bytes(damage)
    with pytest.raises(refusal, match=str(tmp_path)):
        TopKCache.open(tmp_path)


def test_a_manifest_edited_by_hand_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"float32"', '"bfloat16"'))
    with pytest.raises(CorruptRecord, match="its fingerprint is not that of its identity"):
        TopKCache.open(tmp_path)


def test_a_disk_that_refuses_to_read_is_a_storage_error(tmp_path: Path) -> None:
    """A folder in the file's place stands in for the failing disk."""
    cache = TopKCache.create_or_open(tmp_path, IDENTITY)
    path_of(tmp_path, "cd" * 32).mkdir(parents=True)
    for read in (cache.get, cache.contains, lambda _: cache.verify()):
        with pytest.raises(StorageError, match="could not read"):
            read("cd" * 32)


def test_damage_is_named_refused_and_mended(tmp_path: Path, flip_byte: Callable[[Path, int], None]) -> None:
    cache, keys = filled(tmp_path)
    path = path_of(tmp_path, keys[0])
    flip_byte(path, 60)
    (path.parent / ".aside-0-x.topk").write_bytes(b"half")

    with pytest.raises(CorruptRecord, match=r"is damaged: its checksum does not fit; run `hyperagent cache populate`"):
        cache.get(keys[0])
    with structlog.testing.capture_logs() as logged:
        assert not cache.contains(keys[0])
    assert [(line["log_level"], line["key"]) for line in logged] == [("warning", keys[0])]
    seen: list[tuple[int, int]] = []
    report = cache.verify(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert report.records == 2
    assert [damaged for damaged, _ in report.damaged] == [path]
    assert [left.name for left in report.leftovers] == [".aside-0-x.topk"]

    cache.put(keys[0], random_rows(4, 8, seed=0), num_tokens=30)
    assert cache.verify().damaged == ()
    assert cache.contains(keys[0])


def test_rows_that_are_no_distributions_are_not_written(tmp_path: Path) -> None:
    cache = TopKCache.create_or_open(tmp_path, IDENTITY)
    rows = random_rows(4, 8)
    for bad in (
        replace(rows, logprobs=rows.logprobs + 1),
        replace(rows, logprobs=np.full_like(rows.logprobs, np.nan)),
        replace(rows, ids=rows.ids + 1000),
        random_rows(4, 5),
        replace(rows, positions=rows.positions[::-1].copy()),
    ):
        with pytest.raises(InvalidRequest):
            cache.put("ab" * 32, bad, num_tokens=30)
    assert not (tmp_path / "objects").exists()


def test_many_writers_of_one_key(tmp_path: Path) -> None:
    cache, (key, *_) = filled(tmp_path)
    rows = random_rows(4, 8, seed=0)
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(cache.put, key, rows, num_tokens=30) for _ in range(40)]:
            future.result()
    assert cache.verify().records == 3
    assert cache.verify().leftovers == ()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the write fails in its middle just the same."""
    filled(tmp_path, count=1)
    program = (
        "import resource, sys; sys.path.insert(0, sys.argv[2])\n"
        "import numpy as np; from pathlib import Path\n"
        "from cache_rows import random_rows; from hyperagent.cache.store import TopKCache\n"
        "from hyperagent.errors import StorageError\n"
        "cache = TopKCache.open(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))\n"
        "try: cache.put('ab' * 32, random_rows(50, 8), num_tokens=200)\n"
        "except StorageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith("could not write")
    assert len(said.splitlines()) == 1
    cache = TopKCache.open(tmp_path)
    assert cache.verify().records == 1
    assert cache.verify().leftovers == ()


def test_of_two_teachers_that_make_one_cache_at_once_one_is_refused(tmp_path: Path) -> None:
    identities = [replace(IDENTITY, weights=str(number) * 64) for number in range(2)]

    def make(attempt: int) -> list[bool]:
        def outcome(identity: TeacherIdentity) -> bool:
            try:
                return TopKCache.create_or_open(tmp_path / str(attempt), identity).identity == identity
            except IdentityMismatch:
                return False

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(outcome, identities))

    for attempt in range(30):
        assert sorted(make(attempt)) == [False, True]


def test_a_cache_knows_what_data_it_was_populated_from(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path)
    one, other = (data_identity(TokenizerIdentity("1", "2"), source=digit * 64) for digit in "34")
    with pytest.raises(IdentityMismatch, match=f"not populated from data {one.fingerprint} but from none"):
        cache.require_data(one)
    cache.record_data(one)
    cache.record_data(one)
    again = TopKCache.open(tmp_path)
    again.require_data(one)
    assert again.data_fingerprints() == [one.fingerprint]
    assert DataIdentity.from_json((tmp_path / "data" / f"{one.fingerprint}.json").read_bytes()) == one
    with pytest.raises(IdentityMismatch, match=f"but from {one.fingerprint}; run `hyperagent cache populate`"):
        again.require_data(other)
