"""Index of record locations: a SQLite file next to the shards, which can always be rebuilt from them.

A record exists once a transaction has added it to the index: bytes of a shard that the index does not list are ignored,
and the shard's next writer truncates them. The index's write lock prevents several processes from storing the same
record twice.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from hyperagent.cache.format.record import Kind
from hyperagent.cache.format.shard import Location
from hyperagent.errors import CorruptRecord, HyperagentError, StorageError
from hyperagent.storage.sqlite import Database

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE shards (name TEXT PRIMARY KEY, end INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE records (
    key BLOB PRIMARY KEY, kind INTEGER NOT NULL, shard TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX records_of_shard ON records (shard, offset);
"""


@dataclass(frozen=True)
class Entry:
    """One record of the index."""

    key: bytes
    kind: Kind
    at: Location


class Index:
    """SQLite index of records; thread-safe; every process opens its own."""

    def __init__(self, database: Database) -> None:
        """Initialize from an open connection; use `create` or `open` instead."""
        self._database = database

    @classmethod
    def create(cls, path: Path) -> Index:
        """Create an empty index, complete in a single file until it is opened again.

        Raises:
            StorageError: a file operation failed.
        """
        # Closing a write-ahead log reports no error, even if the log could not be written into the file.
        database = _open(path, journal="DELETE")
        try:
            database.create_tables(_SCHEMA, _SCHEMA_VERSION)
        except BaseException:
            database.close()
            raise
        return cls(database)

    @classmethod
    def open(cls, path: Path) -> Index:
        """Open an existing index.

        Raises:
            CorruptRecord: it is damaged or has another version; it can be rebuilt from the shards.
            StorageError: a file operation failed.
        """
        database = _open(path, journal="WAL")
        try:
            if database.version() != _SCHEMA_VERSION:
                raise CorruptRecord(f"{path} is not an index of version {_SCHEMA_VERSION}")
        except BaseException:
            database.close()
            raise
        return cls(database)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def transaction(self) -> AbstractContextManager[object]:
        """Hold the write lock (across processes); all changes inside become durable together at the end.

        Raises:
            StorageError: a file operation failed; nothing has changed.
        """
        return self._database.transaction()

    def find(self, key: bytes) -> Location | None:
        """Return the location of a record, or None if there is no such record."""
        with self._database.connection() as connection:
            found = connection.execute("SELECT shard, offset, length FROM records WHERE key = ?", (key,)).fetchone()
        return Location(*found) if found else None

    def keys(self, kind: Kind) -> list[bytes]:
        """Return all keys of one kind, sorted."""
        with self._database.connection() as connection:
            found = connection.execute("SELECT key FROM records WHERE kind = ? ORDER BY key", (kind,))
            return [key for (key,) in found]

    def entries(self, shard: str) -> list[Entry]:
        """Return the live records of one shard, sorted by offset."""
        with self._database.connection() as connection:
            found = connection.execute(
                "SELECT key, kind, shard, offset, length FROM records WHERE shard = ? ORDER BY offset", (shard,)
            ).fetchall()
        return [Entry(key, Kind(kind), Location(*at)) for key, kind, *at in found]

    def put(self, entries: Iterable[Entry]) -> None:
        """Insert records, replacing any with the same key."""
        with self._database.connection() as connection:
            connection.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)", _to_rows(entries))

    def add(self, entries: Iterable[Entry]) -> None:
        """Insert records whose keys are new; existing ones stay unchanged."""
        with self._database.connection() as connection:
            connection.executemany("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?)", _to_rows(entries))

    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove records by key."""
        with self._database.connection() as connection:
            connection.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in keys])

    def ends(self) -> dict[str, int]:
        """Return the end offset of each shard's records by shard name."""
        with self._database.connection() as connection:
            return dict(connection.execute("SELECT name, end FROM shards ORDER BY name").fetchall())

    def set_end(self, shard: str, end: int) -> None:
        """Set the end offset of a shard's records."""
        with self._database.connection() as connection:
            connection.execute("INSERT OR REPLACE INTO shards VALUES (?, ?)", (shard, end))

    def remove_shard(self, shard: str) -> None:
        """Remove a shard and all of its records."""
        with self._database.connection() as connection:
            connection.execute("DELETE FROM records WHERE shard = ?", (shard,))
            connection.execute("DELETE FROM shards WHERE name = ?", (shard,))


def _to_rows(entries: Iterable[Entry]) -> list[tuple[bytes, int, str, int, int]]:
    return [(entry.key, int(entry.kind), entry.at.shard, entry.at.offset, entry.at.length) for entry in entries]


def _open(path: Path, *, journal: Literal["WAL", "DELETE"]) -> Database:
    # With a write-ahead log, any weaker synchronous mode may lose acknowledged transactions on a power failure.
    return Database(path, domain_error=partial(_domain_error, path), synchronous=True, journal=journal)


def _domain_error(path: Path, error: sqlite3.Error | OSError) -> HyperagentError:
    if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
        return CorruptRecord(f"the cache's index {path} is damaged: {error}; run `hyperagent cache repair`")
    remedy = "check whether its disk is full or read-only, and run the same command again"
    return StorageError(f"could not use the cache's index {path}: {error}; {remedy}")
