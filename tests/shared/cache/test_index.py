"""The index's file: opened by many at once, and never taken for an index when it is something else."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from hyperagent.cache.format.record import Kind
from hyperagent.cache.format.shard import Location
from hyperagent.cache.index import Entry, Index
from hyperagent.errors import CorruptRecord, StorageError

ENTRY = Entry(b"k" * 32, Kind.BLOCK, Location("shard", 64, 128))


def test_many_may_open_a_new_index_at_once(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def open_when_all_are_ready(path: Path) -> None:
        start.wait(60)
        Index.open(path).close()

    with ThreadPoolExecutor(8) as pool:
        for round_ in range(20):
            path = tmp_path / f"{round_}.sqlite"
            Index.create(path).close()
            for opening in [pool.submit(open_when_all_are_ready, path) for _ in range(8)]:
                opening.result()


def test_a_new_index_is_whole_in_its_one_file(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "new.sqlite")
    with index.transaction():
        index.put([ENTRY])
    index.close()
    assert [path.name for path in tmp_path.iterdir()] == ["new.sqlite"]
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes((tmp_path / "new.sqlite").read_bytes())
    assert Index.open(copy).find(ENTRY.key) == ENTRY.at


def test_a_transaction_that_fails_changes_nothing(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index.sqlite")

    def put_and_fail() -> None:
        with index.transaction():
            index.put([ENTRY])
            assert index.find(ENTRY.key) == ENTRY.at
            raise KeyError

    with pytest.raises(KeyError):
        put_and_fail()
    assert index.find(ENTRY.key) is None
    with pytest.raises(OSError, match="of something else") as raised, index.transaction():
        raise OSError("of something else")
    assert not isinstance(raised.value, StorageError)


@pytest.mark.parametrize("version", [0, 1, 3])
def test_an_index_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    path = tmp_path / "index.sqlite"
    Index.create(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(CorruptRecord, match="not an index of version 2"):
        Index.open(path)


def test_an_index_that_another_locks_for_too_long_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperagent.storage.sqlite._WAIT_S", 0.1)
    Index.create(tmp_path / "index.sqlite").close()
    one, other = Index.open(tmp_path / "index.sqlite"), Index.open(tmp_path / "index.sqlite")
    with one.transaction(), pytest.raises(StorageError, match="could not use the cache's index"), other.transaction():
        pass
