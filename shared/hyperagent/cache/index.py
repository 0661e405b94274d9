"""The index: where each record stands. A SQLite file beside the shards, which can always be made again from them.

Its transactions are what makes a record be there: bytes of a shard that the index does not know do not count, and the
shard's next writer cuts them off. Its write lock is what lets several processes put one record once.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hyperagent.cache.format.record import Kind
from hyperagent.cache.format.shard import Location
from hyperagent.errors import CorruptRecord, StorageError

_SCHEMA_VERSION = 2
_BUSY_S = 60.0
"""How long a process waits for another one's transaction, which ends with a disk's answer."""
_SCHEMA = f"""
CREATE TABLE shards (name TEXT PRIMARY KEY, end INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE records (
    key BLOB PRIMARY KEY, kind INTEGER NOT NULL, shard TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX records_of_shard ON records (shard, offset);
PRAGMA user_version = {_SCHEMA_VERSION};
"""


@dataclass(frozen=True)
class Entry:
    """One record of the index."""

    key: bytes
    kind: Kind
    at: Location


class Index:
    """Safe to use from several threads; every process opens its own."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._connection = connection
        self._lock = threading.RLock()

    @classmethod
    def create(cls, path: Path) -> Index:
        """A new, empty index, whole in its one file as long as it is not opened again.

        Raises:
            StorageError: the file system refused.
        """
        # Not with a write-ahead log: what closing it fails to bring into the file, it does so without a word.
        with _as_domain_errors(path), _closed_on_error(_connect(path, journal="DELETE")) as connection:
            connection.executescript(_SCHEMA)
        return cls(path, connection)

    @classmethod
    def open(cls, path: Path) -> Index:
        """An existing index.

        Raises:
            CorruptRecord: it is damaged or of another version; it can be made again from the shards.
            StorageError: the file system refused.
        """
        with _as_domain_errors(path), _closed_on_error(_connect(path, journal="WAL")) as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] != _SCHEMA_VERSION:
                raise CorruptRecord(f"{path} is not an index of version {_SCHEMA_VERSION}")
        return cls(path, connection)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock, against other processes too; all changes inside become durable together at its end.

        Raises:
            StorageError: the file system refused; nothing has changed.
        """
        with self._lock, _as_domain_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def find(self, key: bytes) -> Location | None:
        """Where a record stands."""
        with self._lock, _as_domain_errors(self.path):
            found = self._connection.execute(
                "SELECT shard, offset, length FROM records WHERE key = ?", (key,)
            ).fetchone()
        return Location(*found) if found else None

    def keys(self, kind: Kind) -> list[bytes]:
        """All keys of one kind, sorted."""
        with self._lock, _as_domain_errors(self.path):
            found = self._connection.execute("SELECT key FROM records WHERE kind = ? ORDER BY key", (kind,))
            return [key for (key,) in found]

    def entries(self, shard: str) -> list[Entry]:
        """The records that count of one shard, by offset."""
        with self._lock, _as_domain_errors(self.path):
            found = self._connection.execute(
                "SELECT key, kind, shard, offset, length FROM records WHERE shard = ? ORDER BY offset", (shard,)
            ).fetchall()
        return [Entry(key, Kind(kind), Location(*at)) for key, kind, *at in found]

    def put(self, entries: Iterable[Entry]) -> None:
        """Name records, each in the place of what had its key."""
        with self._lock, _as_domain_errors(self.path):
            self._connection.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)", _to_rows(entries))

    def add(self, entries: Iterable[Entry]) -> None:
        """Name records whose key has none yet; the others are left as they are."""
        with self._lock, _as_domain_errors(self.path):
            self._connection.executemany("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?)", _to_rows(entries))

    def remove(self, keys: Sequence[bytes]) -> None:
        """Forget records."""
        with self._lock, _as_domain_errors(self.path):
            self._connection.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in keys])

    def ends(self) -> dict[str, int]:
        """Where the records of each shard end."""
        with self._lock, _as_domain_errors(self.path):
            return dict(self._connection.execute("SELECT name, end FROM shards ORDER BY name").fetchall())

    def set_end(self, shard: str, end: int) -> None:
        """Say where the records of a shard end."""
        with self._lock, _as_domain_errors(self.path):
            self._connection.execute("INSERT OR REPLACE INTO shards VALUES (?, ?)", (shard, end))

    def remove_shard(self, shard: str) -> None:
        """Forget a shard and all of its records."""
        with self._lock, _as_domain_errors(self.path):
            self._connection.execute("DELETE FROM records WHERE shard = ?", (shard,))
            self._connection.execute("DELETE FROM shards WHERE name = ?", (shard,))


def _to_rows(entries: Iterable[Entry]) -> list[tuple[bytes, int, str, int, int]]:
    return [(entry.key, int(entry.kind), entry.at.shard, entry.at.offset, entry.at.length) for entry in entries]


@contextmanager
def _as_domain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        remedy = "see whether its disk is full or read-only, and run the same command again"
        raise StorageError(f"could not use the cache's index {path}: {error}; {remedy}") from error
    except sqlite3.DatabaseError as error:
        raise CorruptRecord(f"the cache's index {path} is damaged: {error}; run `hyperagent cache repair`") from error


def _connect(path: Path, *, journal: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    with _closed_on_error(connection):
        connection.execute(f"PRAGMA journal_mode = {journal}")
        # With a write-ahead log anything less than FULL may lose the last transactions with the power, and they are acknowledged.
        connection.execute("PRAGMA synchronous = FULL")
    return connection


@contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    try:
        yield connection
    except BaseException:
        connection.close()
        raise
