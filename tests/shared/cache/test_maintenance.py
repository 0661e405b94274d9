"""Looking after a cache: repair after damage, compaction, garbage, and who may do what while others read."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_rows import IDENTITY, TOKENS, filled, random_rows

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.format.shard import OPEN, SEALED, ShardWriter, shard_paths
from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance import compact as compact_module
from hyperagent.cache.maintenance import repair as repair_module
from hyperagent.cache.maintenance.compact import collect_garbage, compact
from hyperagent.cache.maintenance.repair import QUARANTINE, repair
from hyperagent.cache.maintenance.stats import count
from hyperagent.cache.maintenance.verify import verify
from hyperagent.errors import Conflict, CorruptRecord, NotFound, StorageError

SETTINGS = CacheSettings(codec="exact", block_tokens=16)


def make(root: Path, trajectories: int = 12, *, shard_bytes: int = 4096) -> list[str]:
    with LocalCache.create_or_open(root, IDENTITY, settings=SETTINGS, shard_bytes=shard_bytes) as cache:
        return filled(cache, trajectories)


def assert_rows(cache: LocalCache, keys: list[str]) -> None:
    for number, key in enumerate(keys):
        meant = random_rows(10 + number % 10, 8, seed=number)
        np.testing.assert_array_equal(np.sort(cache.get(key).rows.ids), np.sort(meant.ids))


def test_repair_keeps_what_is_whole_and_quarantines_the_rest(
    tmp_path: Path, flip_byte: Callable[[Path, int], None]
) -> None:
    keys = make(tmp_path)
    with LocalCache.open(tmp_path) as cache:
        at = cache.index.find(cache.trajectory(keys[0]).blocks[1].key)
    assert at is not None
    shard = next(path for path in shard_paths(tmp_path / "shards") if path.stem == at.shard)
    flip_byte(shard, at.offset + 150)
    (tmp_path / "index.sqlite").write_bytes(b"not an index")
    (tmp_path / "shards" / ".partial-left.open").write_bytes(b"x")

    report = repair(tmp_path)

    assert report.to_populate == (keys[0],)
    assert report.trajectories == 11
    assert [path.name for path in report.quarantined] == [shard.name]
    assert report.quarantined[0].read_bytes()[:8] == b"HATKSHD2"
    assert {damage.offset for damage in report.damaged} >= {at.offset}
    with LocalCache.open(tmp_path) as cache:
        after = verify(cache)
        assert (after.damaged, after.incomplete, after.leftovers, after.trajectories) == ((), (), (), 11)
        # Of the trajectory that lost a block, only that block is computed again.
        assert cache.capture(TOKENS, random_rows(10, 8).positions).first_row == 8
        assert cache.put(TOKENS, random_rows(10, 8)) == keys[0]
        assert_rows(cache, keys)
    assert repair(tmp_path).damaged == ()


def test_repair_of_a_shard_without_its_header_or_footer(tmp_path: Path, flip_byte: Callable[[Path, int], None]) -> None:
    keys = make(tmp_path)
    sealed = [path for path in shard_paths(tmp_path / "shards") if path.suffix == SEALED]
    assert len(sealed) >= 2
    flip_byte(sealed[1], sealed[1].stat().st_size - 3)
    report = repair(tmp_path)
    # The records are found by reading the shard from its beginning.
    assert (report.to_populate, report.trajectories) == ((), 12)
    flip_byte(sealed[0], 10)
    report = repair(tmp_path)
    assert len(report.quarantined) == 1
    with LocalCache.open(tmp_path) as cache:
        assert (verify(cache).damaged, verify(cache).incomplete) == ((), ())
        for number in range(12):
            cache.put(TOKENS + number, random_rows(10 + number % 10, 8, seed=number))
        assert_rows(cache, keys)


def test_repair_of_a_shard_that_was_being_written(tmp_path: Path, flip_byte: Callable[[Path, int], None]) -> None:
    keys = make(tmp_path, 3, shard_bytes=1 << 20)
    with LocalCache.open(tmp_path) as cache:
        at = cache.index.find(cache.trajectory(keys[1]).blocks[0].key)
    assert at is not None
    (shard,) = shard_paths(tmp_path / "shards")
    flip_byte(shard, at.offset + 40)
    shard.write_bytes(shard.read_bytes() + b"torn")
    report = repair(tmp_path)
    assert (report.to_populate, report.trajectories) == ((keys[1],), 2)
    assert [path.name for path in report.quarantined] == [shard.name]
    assert not shard.exists()
    with LocalCache.open(tmp_path) as cache:
        assert verify(cache).damaged == ()
        cache.put(TOKENS + 1, random_rows(11, 8, seed=1))
        assert_rows(cache, keys)


def test_nothing_is_removed_while_somebody_reads(tmp_path: Path) -> None:
    keys = make(tmp_path)
    with LocalCache.open(tmp_path) as reader:
        with pytest.raises(Conflict, match="another process has it open; first stop the trainers and teachers"):
            LocalCache.open(tmp_path, exclusive=True)
        with pytest.raises(Conflict, match="is in use"):
            repair(tmp_path)
        # What only moves records may run beside a reader, who finds them where they are now.
        first = reader.get(keys[0]).rows
        with LocalCache.open(tmp_path) as other:
            assert compact(other).shards_after == 1
        assert_rows(reader, keys)
        np.testing.assert_array_equal(first.ids, reader.get(keys[0]).rows.ids)
    with LocalCache.open(tmp_path, exclusive=True), pytest.raises(Conflict, match="something is being removed"):
        LocalCache.open(tmp_path)


def test_compaction_frees_dead_bytes_and_leaves_one_sealed_shard(tmp_path: Path) -> None:
    keys = make(tmp_path)
    with LocalCache.open(tmp_path) as cache:
        with cache.index.transaction():
            cache.index.remove([bytes.fromhex(key) for key in keys[6:]])
        dead = count(cache).dead_bytes
        report = compact(cache)
        assert dead > 0
        assert count(cache).dead_bytes == 0
        assert report.bytes_before - report.bytes_after >= dead
        assert [path.suffix for path in shard_paths(cache.shards)] == [SEALED]
        assert_rows(cache, keys[:6])
        again = compact(cache)
        assert (again.shards_after, again.bytes_after) == (1, report.bytes_after)
        assert verify(cache).damaged == ()
    (tmp_path / "index.sqlite").unlink()
    with LocalCache.open(tmp_path) as cache:
        assert cache.trajectory_keys() == sorted(keys[:6])


def test_a_shard_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SETTINGS) as writer, LocalCache.open(tmp_path) as other:
        writer.put(TOKENS, random_rows(5, 8))
        other.put(TOKENS + 1, random_rows(5, 8))
        compact(other)
        assert sorted(path.suffix for path in shard_paths(other.shards)) == [OPEN, SEALED]
        writer.put(TOKENS + 2, random_rows(5, 8))
        assert verify(other).trajectories == 3


def test_garbage_is_what_no_trajectory_needs(tmp_path: Path) -> None:
    keys = make(tmp_path)
    with LocalCache.open(tmp_path) as cache:
        rows = random_rows(20, 8, seed=77)
        partial = cache.capture(TOKENS + 100, rows.positions)
        partial.add(rows.part(slice(10)))
        partial.flush()
        blocks = count(cache).blocks
    (tmp_path / ".partial-left").write_bytes(b"x")
    with LocalCache.open(tmp_path, exclusive=True) as cache:
        report = collect_garbage(cache, None)
        assert (report.trajectories_removed, report.blocks_removed, report.leftovers_removed) == (0, 1, 1)
        assert count(cache).blocks == blocks - 1
        report = collect_garbage(cache, {keys[3], keys[5], "00" * 32})
        assert report.trajectories_removed == 10
        assert cache.trajectory_keys() == sorted([keys[3], keys[5]])
        assert report.compacted.bytes_after < report.compacted.bytes_before
        assert_rows(cache, [])
        with pytest.raises(NotFound):
            cache.get(keys[0])
        assert verify(cache).damaged == ()


def test_blocks_that_are_shared_stay_for_the_one_that_is_kept(tmp_path: Path) -> None:
    rows = random_rows(20, 8)
    branch = TOKENS.copy()
    branch[35] += 1
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=SETTINGS) as cache:
        first, second = cache.put(TOKENS, rows), cache.put(branch, rows)
    with LocalCache.open(tmp_path, exclusive=True) as cache:
        collect_garbage(cache, {second})
        assert cache.get(second).rows.num_rows == 20
        assert (count(cache).blocks, count(cache).shared_tokens) == (3, 0)
        assert not cache.contains(first)


def refuse(*_: object) -> Any:
    raise OSError(errno.EIO, "Input/output error")


def test_a_shard_of_another_teacher_is_named_and_its_records_do_not_count(tmp_path: Path) -> None:
    keys = make(tmp_path / "cache", 3)
    stranger = replace(IDENTITY, weights="9" * 64)
    with LocalCache.create_or_open(tmp_path / "other", stranger, settings=SETTINGS) as other:
        filled(other, 3)
        other.seal()
    (foreign,) = shard_paths(tmp_path / "other" / "shards")
    shutil.copy(foreign, tmp_path / "cache" / "shards")
    with LocalCache.open(tmp_path / "cache") as cache:
        assert ("it belongs to another teacher", foreign.name) in {
            (damage.reason, damage.path.name) for damage in verify(cache).damaged
        }
    (tmp_path / "cache" / "index.sqlite").unlink()
    with LocalCache.open(tmp_path / "cache") as cache:
        assert cache.trajectory_keys() == sorted(keys)


def test_a_record_that_stands_in_the_place_of_another_is_not_served(tmp_path: Path) -> None:
    keys = make(tmp_path, 2, shard_bytes=1 << 20)
    with LocalCache.open(tmp_path) as cache:
        first, second = (cache.trajectory(key).blocks[0].key for key in keys)
        at = {key: cache.index.find(key) for key in (first, second)}
        entry = next(e for e in cache.index.entries(at[first].shard) if e.key == second)  # type: ignore[union-attr]
        with cache.index.transaction():
            cache.index.remove([first])
            cache.index.add([replace(entry, key=first)])
        with pytest.raises(CorruptRecord, match=f"it is the record of another key, {second.hex()}"):
            cache.get(keys[0])


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    (key,) = make(tmp_path, 1)
    with LocalCache.open(tmp_path) as cache:
        for path in shard_paths(tmp_path / "shards"):
            path.unlink()
        with pytest.raises(NotFound, match="has no shard"):
            cache.get(key)


def test_copying_does_not_wait_for_all_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = make(tmp_path)
    monkeypatch.setattr(compact_module, "_COPY_BYTES", 1000)
    with LocalCache.open(tmp_path) as cache:
        assert compact(cache).shards_before > 1
        assert verify(cache).damaged == ()
        assert_rows(cache, keys)


def test_a_shard_that_cannot_be_deleted_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = make(tmp_path)
    with LocalCache.open(tmp_path) as cache:
        with monkeypatch.context() as patched:
            patched.setattr(compact_module, "fsync_directory", refuse)
            with pytest.raises(StorageError, match=r"could not delete .*\.(shard|open): Input/output error"):
                compact(cache)
        assert_rows(cache, keys)
        compact(cache)
        assert_rows(cache, keys)


def test_repair_that_is_refused_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip_byte: Callable[[Path, int], None]
) -> None:
    keys = make(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(repair_module, "rebuild_index", refuse)
        with pytest.raises(StorageError, match="could not rebuild the index: Input/output error"):
            repair(tmp_path)
    damaged = next(path for path in shard_paths(tmp_path / "shards") if path.suffix == SEALED)
    flip_byte(damaged, 200)
    (tmp_path / QUARANTINE).write_bytes(b"in the way")
    with pytest.raises(StorageError, match=f"could not quarantine .*{damaged.name}: "):
        repair(tmp_path)
    (tmp_path / QUARANTINE).unlink()
    assert repair(tmp_path).trajectories < len(keys)


def test_a_shard_that_is_gone_or_shorter_than_the_index_says_has_no_next_writer(tmp_path: Path) -> None:
    make(tmp_path, 1, shard_bytes=1 << 20)
    (path,) = shard_paths(tmp_path / "shards")
    assert ShardWriter.resume(path.with_name("gone.open"), end=64) is None
    assert ShardWriter.resume(path, end=path.stat().st_size + 1) is None
    writer = ShardWriter.resume(path, end=path.stat().st_size)
    assert writer is not None
    assert ShardWriter.resume(path, end=path.stat().st_size) is None
    writer.close()


def test_sealing_when_nothing_is_open_does_nothing(tmp_path: Path) -> None:
    make(tmp_path, 2, shard_bytes=1 << 20)
    with LocalCache.open(tmp_path) as cache:
        cache.seal()
        before = shard_paths(tmp_path / "shards")
        cache.seal()
        assert shard_paths(tmp_path / "shards") == before
