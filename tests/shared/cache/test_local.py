"""The cache on disk: what is put is there once, whole, and of one teacher."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog
from cache_rows import IDENTITY, TOKENS, filled, random_rows
from data_identity import data_identity

from hyperagent.cache import trajectory_writer as capture_module
from hyperagent.cache.format.codecs import CODECS
from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.format.shard import SEALED, shard_paths
from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.stats import count
from hyperagent.cache.maintenance.verify import verify
from hyperagent.errors import (
    ConfigError,
    CorruptRecord,
    IdentityMismatch,
    InvalidRequest,
    NotFound,
    StorageError,
)
from hyperagent.identity import DataIdentity, TeacherIdentity, TokenizerIdentity
from hyperagent.topk import TopKRows

SMALL_BLOCKS = CacheSettings(codec="exact", block_tokens=16)


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_put_is_read_again(tmp_path: Path, codec: str) -> None:
    settings = CacheSettings(codec=codec, block_tokens=16)
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=settings) as cache:
        keys = filled(cache)
    with LocalCache.open(tmp_path) as cache:
        assert (cache.identity, cache.settings) == (IDENTITY, settings)
        assert cache.trajectory_keys() == sorted(keys)
        assert all(cache.contains(key) and cache.is_intact(key) for key in keys)
        for number, key in enumerate(keys):
            put, read = random_rows(10 + number, 8, seed=number), cache.get(key)
            read.rows.validate(num_tokens=40, vocab_size=IDENTITY.vocab_size, temperatures=IDENTITY.temperatures)
            assert read.num_tokens == 40
            np.testing.assert_array_equal(read.rows.positions, put.positions)
            np.testing.assert_array_equal(np.sort(read.rows.ids), np.sort(put.ids))
            np.testing.assert_allclose(read.rows.target_logprob, put.target_logprob, atol=1e-2)
            np.testing.assert_allclose(read.rows.tail_logmass, put.tail_logmass, atol=1e-2)
            by_id = [np.take_along_axis(rows.logprobs, np.argsort(rows.ids), axis=1) for rows in (put, read.rows)]
            np.testing.assert_allclose(*by_id, atol={"exact": 5e-3, "compact": 0.05, "archive": 0.13}[codec])
        assert not cache.contains("00" * 32)
        assert not cache.is_intact("00" * 32)
        with pytest.raises(NotFound, match="has no record 0000"):
            cache.get("00" * 32)


def test_what_is_held_is_counted(tmp_path: Path) -> None:
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as cache:
        filled(cache)
        stats = count(cache)
    assert (stats.trajectories, stats.blocks, stats.supervised_tokens, stats.context_tokens) == (3, 6, 33, 120)
    assert (stats.shared_tokens, stats.dead_bytes, stats.mean_k, stats.top_k) == (0, 0, 8.0, 8)
    assert stats.bytes == sum(path.stat().st_size for path in tmp_path.glob("shards/*"))
    assert stats.bytes_per_token == stats.bytes / 33
    kept = [np.exp(random_rows(10 + number, 8, seed=number).logprobs).sum(axis=1) for number in range(3)]
    assert stats.kept_mass == pytest.approx(np.concatenate(kept).mean(), rel=1e-5)
    assert abs(stats.kl_nats) < 1e-5


def test_adaptive_k_keeps_what_the_mass_needs(tmp_path: Path) -> None:
    settings = CacheSettings(codec="compact", kept_mass=0.9, min_k=2)
    rows = random_rows(15, 8, spread=6.0)
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=settings) as cache:
        read = cache.get(cache.put(TOKENS, rows)).rows
        stats = count(cache)
    read.validate(num_tokens=40, vocab_size=IDENTITY.vocab_size, temperatures=IDENTITY.temperatures)
    for n in range(15):
        mass = np.exp(rows.logprobs[n].astype(np.float64)).cumsum()
        needed = min(max(int((mass < 0.9).sum()) + 1, 2), 8)
        assert read.counts[n] == needed
        assert set(read.ids[n, :needed]) == set(rows.ids[n, :needed])
        left = 1 - mass[needed - 1]
        assert np.exp(read.tail_logmass[n]) == pytest.approx(left, rel=5e-3, abs=1e-6)
    assert stats.mean_k == pytest.approx(read.counts.mean())
    assert 2 <= stats.mean_k < 8


def test_trajectories_that_begin_alike_share_blocks(tmp_path: Path) -> None:
    """The rows of a block are found by the tokens up to it, whatever comes behind it."""
    rows = random_rows(20, 8)
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as cache:
        cache.put(TOKENS, rows)
        alone = sum(path.stat().st_size for path in tmp_path.glob("shards/*"))
        branch = TOKENS.copy()
        branch[35] += 1
        other = cache.put(branch, rows)
        grown = sum(path.stat().st_size for path in tmp_path.glob("shards/*")) - alone
        stats = count(cache)
        assert cache.get(other).rows.num_rows == 20
        shorter = random_rows(8, 8)
        assert cache.capture(TOKENS[:20], shorter.positions).first_row == 8
    # Of three blocks two are shared: 8 rows of 1, 3 ... 15 and as many of 17 ... 31.
    assert (stats.trajectories, stats.blocks, stats.shared_tokens) == (2, 4, 16)
    assert grown < alone / 2


def test_a_key_covers_teacher_tokens_and_positions(tmp_path: Path) -> None:
    cache = LocalCache.create_or_open(tmp_path / "a", IDENTITY)
    other = LocalCache.create_or_open(tmp_path / "b", replace(IDENTITY, weights="9" * 64))
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
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as cache:
        filled(cache)
    assert LocalCache.create_or_open(tmp_path, replace(IDENTITY, model="renamed")).identity == IDENTITY
    for other in (
        replace(IDENTITY, dtype="bfloat16"),
        replace(IDENTITY, tokenizer_sha256="7" * 64),
        replace(IDENTITY, template_sha256="7" * 64),
        replace(IDENTITY, top_k=16),
    ):
        with pytest.raises(IdentityMismatch, match="folder of its own") as refusal:
            LocalCache.create_or_open(tmp_path, other)
        name = next(name for name in vars(other) if getattr(other, name) != getattr(IDENTITY, name))
        for identity in (IDENTITY, other):
            assert f"{name}={getattr(identity, name)}" in str(refusal.value)
    with pytest.raises(ConfigError, match="there is no cache"):
        LocalCache.open(tmp_path / "elsewhere")


def test_rows_are_stored_in_one_way(tmp_path: Path) -> None:
    LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS).close()
    assert LocalCache.create_or_open(tmp_path, IDENTITY).settings == SMALL_BLOCKS
    assert LocalCache.create_or_open(tmp_path, IDENTITY, settings=CacheSettings(codec="exact")).settings == SMALL_BLOCKS
    with pytest.raises(ConfigError, match=r"codec='exact'.*not with \{'codec': 'archive'\}; leave that out"):
        LocalCache.create_or_open(tmp_path, IDENTITY, settings=CacheSettings(codec="archive"))


@pytest.mark.parametrize(
    ("damage", "refusal"),
    [
        (b"[]", CorruptRecord),
        (b"null", CorruptRecord),
        (b'{"format_version": 2}', CorruptRecord),
        (b'{"format_version": 2, "identity": {"x": 1}, "fingerprint": ""}', CorruptRecord),
        (b"\xff", CorruptRecord),
        (b'{"format_version": 1}', ConfigError),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, damage: bytes, refusal: type[Exception]) -> None:
    LocalCache.create_or_open(tmp_path, IDENTITY).close()
    (tmp_path / "manifest.json").write_bytes(damage)
    with pytest.raises(refusal, match=str(tmp_path)):
        LocalCache.open(tmp_path)


def test_what_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    data = data_identity(TokenizerIdentity("1", "2"), source="3" * 64)
    with LocalCache.create_or_open(tmp_path, IDENTITY) as cache:
        cache.record_data(data)
        assert cache.data_identities() == [data]
        path = tmp_path / "data" / f"{data.fingerprint}.json"
        for content in (b"{", path.read_bytes().replace(b"3" * 64, b"4" * 64)):
            path.write_bytes(content)
            with pytest.raises(CorruptRecord, match="is damaged; remove it, and populate from its tokens file again"):
                cache.data_identities()
        path.unlink()
        path.mkdir()
        with pytest.raises(StorageError, match=f"could not read {path}: Is a directory"):
            cache.data_identities()
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(StorageError, match=r"could not read .*manifest.json: Is a directory"):
        LocalCache.open(tmp_path)


@pytest.mark.parametrize(("old", "new"), [('"float32"', '"bfloat16"'), ('"compact"', '"zip"')])
def test_a_manifest_edited_by_hand_is_refused(tmp_path: Path, old: str, new: str) -> None:
    LocalCache.create_or_open(tmp_path, IDENTITY).close()
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CorruptRecord, match=f"{path} is damaged"):
        LocalCache.open(tmp_path)


def test_a_capture_goes_on_at_the_first_missing_block(tmp_path: Path) -> None:
    rows = random_rows(20, 8)
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as cache:
        whole = LocalCache.create_or_open(tmp_path / "whole", IDENTITY, settings=SMALL_BLOCKS)
        key = whole.put(TOKENS, rows)
        first = cache.capture(TOKENS, rows.positions)
        assert first.first_row == 0
        first.add(rows.part(slice(3)))
        first.add(rows.part(slice(3, 18)))
        first.flush()
        assert not cache.contains(key)
        assert cache.trajectory_keys() == []

        again = cache.capture(TOKENS, rows.positions)
        assert again.first_row == 16
        with pytest.raises(InvalidRequest, match="rows at positions from 1 came where those from 33 are due"):
            again.add(rows.part(slice(4)))
        again = cache.capture(TOKENS, rows.positions)
        again.add(rows.part(slice(16, 18)))
        with pytest.raises(InvalidRequest, match="ends with 2 rows over before block 2 of 3"):
            again.finish()
        again.add(rows.part(slice(18, 20)))
        again.finish()
        assert cache.stored_digest(key) == whole.stored_digest(key)
        assert verify(cache).digest == verify(whole).digest
        again.add(rows.part(slice(1)))
        with pytest.raises(InvalidRequest, match="ends with 1 rows over"):
            again.finish()


def test_a_shard_is_sealed_when_it_is_full_and_the_next_one_begun(tmp_path: Path) -> None:
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS, shard_bytes=4096) as cache:
        keys = filled(cache, 12)
        sealed = [path for path in shard_paths(tmp_path / "shards") if path.suffix == SEALED]
        assert len(sealed) >= 2
        assert all(cache.is_intact(key) for key in keys)
        assert verify(cache).damaged == ()
    with LocalCache.open(tmp_path) as cache:
        assert verify(cache).trajectories == 12


def test_the_next_writer_goes_on_with_the_open_shard(tmp_path: Path) -> None:
    for number in range(3):
        with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as cache:
            cache.put(TOKENS + number, random_rows(5, 8, seed=number))
    assert len(shard_paths(tmp_path / "shards")) == 1
    with LocalCache.open(tmp_path) as one, LocalCache.open(tmp_path) as other:
        for number, cache in enumerate((one, other)):
            cache.put(TOKENS + 10 + number, random_rows(5, 8, seed=number))
        assert len(shard_paths(tmp_path / "shards")) == 2
        assert one.trajectory_keys() == other.trajectory_keys()
        assert verify(one).trajectories == 5


@pytest.mark.parametrize("suffixes", [("",), ("", "-wal", "-shm")])
def test_the_index_is_made_again_from_the_shards(tmp_path: Path, suffixes: tuple[str, ...]) -> None:
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS, shard_bytes=4096) as cache:
        filled(cache, 12)
        before = verify(cache)
        locations = [cache.index.find(bytes.fromhex(key)) for key in cache.trajectory_keys()]
    for suffix in suffixes:
        Path(f"{tmp_path}/index.sqlite{suffix}").unlink(missing_ok=True)
    with LocalCache.open(tmp_path) as cache:
        assert verify(cache) == before
        assert [cache.index.find(bytes.fromhex(key)) for key in cache.trajectory_keys()] == locations


@pytest.mark.parametrize("damage", [b"", b"no index at all" * 100, None])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as cache:
        filled(cache)
        before = verify(cache)
    path = tmp_path / "index.sqlite"
    path.write_bytes(path.read_bytes()[:50] if damage is None else damage)
    with structlog.testing.capture_logs() as logged, LocalCache.open(tmp_path) as cache:
        assert verify(cache) == before
    assert [line["event"] for line in logged] == ["rebuilding damaged index"]


def test_damage_is_named_refused_and_mended(tmp_path: Path, flip_byte: Callable[[Path, int], None]) -> None:
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as cache:
        keys = filled(cache)
        before = verify(cache)
        at = cache.index.find(cache.trajectory(keys[1]).blocks[0].key)
    assert at is not None
    (shard,) = shard_paths(tmp_path / "shards")
    flip_byte(shard, at.offset + 200)
    (tmp_path / ".partial-0-x").write_bytes(b"half")

    with LocalCache.open(tmp_path) as cache:
        with pytest.raises(
            CorruptRecord, match=r"byte \d+ is damaged: its checksum does not match; run `hyperagent cache"
        ):
            cache.get(keys[1])
        with structlog.testing.capture_logs() as logged:
            assert not cache.is_intact(keys[1])
        assert [(line["log_level"], line["trajectory"]) for line in logged] == [("warning", keys[1])]
        seen: list[tuple[int, int]] = []
        report = verify(cache, lambda done, total: seen.append((done, total)))
        assert seen[-1][0] <= seen[-1][1] == shard.stat().st_size
        assert (report.trajectories, report.incomplete) == (2, (keys[1],))
        assert [(found.path, found.offset) for found in report.damaged] == [(shard, at.offset)]
        assert [left.name for left in report.leftovers] == [".partial-0-x"]

        cache.put(TOKENS + 1, random_rows(11, 8, seed=1))
        repaired = verify(cache)
        assert (repaired.trajectories, repaired.digest) == (3, before.digest)
        assert [(found.path, found.offset) for found in repaired.damaged] == [(shard, at.offset)]
        assert count(cache).dead_bytes == at.length


def test_damage_after_a_first_read_is_found_by_asking_whether_a_trajectory_is_intact(
    tmp_path: Path,
) -> None:
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as cache:
        key = cache.put(TOKENS, random_rows(20, 8))
        cache.get(key)
        assert cache.is_intact(key)
        at = cache.index.find(cache.trajectory(key).blocks[1].key)
        assert at is not None
        (shard,) = shard_paths(tmp_path / "shards")
        # In place, as a failing disk would: the reader keeps its descriptor.
        with shard.open("r+b") as file:
            file.seek(at.offset + 200)
            (byte,) = file.read(1)
            file.seek(at.offset + 200)
            file.write(bytes([byte ^ 1]))
        assert not cache.is_intact(key)
        assert cache.put(TOKENS, random_rows(20, 8)) == key
        assert cache.is_intact(key)


def test_rows_that_are_no_distributions_are_not_written(tmp_path: Path) -> None:
    cache = LocalCache.create_or_open(tmp_path, IDENTITY)
    rows = random_rows(4, 8)
    bad_padding = replace(rows, logprobs=np.where(np.arange(8) < 4, rows.logprobs, -np.inf).astype(np.float32))
    for bad in (
        replace(rows, logprobs=rows.logprobs + 1),
        replace(rows, logprobs=np.full_like(rows.logprobs, np.nan)),
        replace(rows, logprobs=np.full_like(rows.logprobs, -np.inf)),
        replace(rows, ids=rows.ids + 1000),
        random_rows(4, 5),
        replace(rows, positions=rows.positions[::-1].copy()),
        bad_padding,
    ):
        with pytest.raises(InvalidRequest):
            cache.put(TOKENS, bad)
    assert not (tmp_path / "shards").exists()


def put_all(cache: LocalCache) -> None:
    for number in range(10):
        cache.put(TOKENS + number, random_rows(12, 8, seed=number))


def put_all_in_process(root: str) -> None:
    with LocalCache.create_or_open(Path(root), IDENTITY, settings=SMALL_BLOCKS) as cache:
        put_all(cache)


def test_a_long_capture_is_made_durable_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_WRITE_BYTES", 100)
    how = CacheSettings(block_tokens=16)
    rows = random_rows(20, 8)
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=how) as cache:
        cache.capture(TOKENS, rows.positions).add(rows.part(slice(9)))
        # Its object is gone, but the whole blocks it was given are not.
        assert cache.capture(TOKENS, rows.positions).first_row == 8


def test_many_threads_and_processes_that_put_the_same_leave_one_record(tmp_path: Path) -> None:
    with LocalCache.create_or_open(tmp_path / "threads", IDENTITY, settings=SMALL_BLOCKS) as cache:
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(put_all, cache) for _ in range(8)]:
                done.result()
        expected = verify(cache)
        assert (expected.trajectories, expected.damaged, count(cache).dead_bytes) == (10, (), 0)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as processes:
        list(processes.map(put_all_in_process, [str(tmp_path / "processes")] * 4))
    with LocalCache.open(tmp_path / "processes") as cache:
        assert verify(cache) == replace(expected)
        assert count(cache).dead_bytes == 0


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the write fails in its middle just the same."""
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as cache:
        key = cache.put(TOKENS, random_rows(5, 8))
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.path.insert(0, sys.argv[2])\n"
        "import numpy as np; from pathlib import Path\n"
        "from cache_rows import random_rows; from hyperagent.cache.local import LocalCache\n"
        "from hyperagent.errors import StorageError\n"
        "cache = LocalCache.open(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: cache.put(np.arange(300, dtype=np.uint32), random_rows(90, 8))\n"
        "except StorageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parents[1])]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith("could not write the cache's records")
    assert len(said.splitlines()) == 1
    with LocalCache.open(tmp_path) as cache:
        assert cache.trajectory_keys() == [key]
        report = verify(cache)
        assert (report.damaged, report.incomplete, report.leftovers) == ((), (), ())
        cache.put(np.arange(300, dtype=np.uint32), random_rows(90, 8))
        assert verify(cache).trajectories == 2


def test_a_reader_follows_a_shard_that_grows(tmp_path: Path) -> None:
    with (
        LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as writer,
        LocalCache.open(tmp_path) as reader,
    ):
        early: list[TopKRows] = []
        for number in range(20):
            key = writer.put(TOKENS + number, random_rows(10, 8, seed=number))
            early.append(reader.get(key).rows)
    for number, rows in enumerate(early):
        np.testing.assert_array_equal(np.sort(rows.ids), np.sort(random_rows(10, 8, seed=number).ids))


def test_of_two_teachers_that_make_one_cache_at_once_one_is_refused(tmp_path: Path) -> None:
    identities = [replace(IDENTITY, weights=str(number) * 64) for number in range(2)]

    def make(attempt: int) -> list[bool]:
        def outcome(identity: TeacherIdentity) -> bool:
            try:
                return LocalCache.create_or_open(tmp_path / str(attempt), identity).identity == identity
            except IdentityMismatch:
                return False

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(outcome, identities))

    for attempt in range(30):
        assert sorted(make(attempt)) == [False, True]


def test_a_cache_knows_what_data_it_was_populated_from(tmp_path: Path) -> None:
    cache = LocalCache.create_or_open(tmp_path, IDENTITY)
    one, other = (data_identity(TokenizerIdentity("1", "2"), source=digit * 64) for digit in "34")
    with pytest.raises(IdentityMismatch, match=f"not populated from data {one.fingerprint} but from none"):
        cache.require_data(one)
    cache.record_data(one)
    cache.record_data(one)
    again = LocalCache.open(tmp_path)
    again.require_data(one)
    assert again.data_fingerprints() == [one.fingerprint]
    assert DataIdentity.from_json((tmp_path / "data" / f"{one.fingerprint}.json").read_bytes()) == one
    with pytest.raises(IdentityMismatch, match=f"but from {one.fingerprint}; run `hyperagent cache populate`"):
        again.require_data(other)


def test_no_room_for_another_open_file_is_one_clear_error(tmp_path: Path) -> None:
    with LocalCache.create_or_open(tmp_path, IDENTITY) as cache:
        key = cache.put(TOKENS, random_rows(5, 8))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        try:
            with pytest.raises(StorageError, match=r"could not open shard .*: Too many open files; .*ulimit -n"):
                cache.get(key)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        cache.get(key)


def test_a_shard_that_is_gone_is_a_clear_error(tmp_path: Path) -> None:
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SMALL_BLOCKS) as cache:
        key = cache.put(TOKENS, random_rows(5, 8))
    (shard,) = shard_paths(tmp_path / "shards")
    shard.unlink()
    with LocalCache.open(tmp_path) as cache:
        assert cache.contains(key)
        assert not cache.is_intact(key)
        (damage,) = verify(cache).damaged
        assert "the shard is missing, and with it 2 records" in damage.reason
    shard.mkdir()
    with LocalCache.open(tmp_path) as cache, pytest.raises(StorageError, match="could not read"):
        cache.get(key)
