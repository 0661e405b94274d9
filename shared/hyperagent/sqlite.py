"""A small SQLite file (https://www.sqlite.org/wal.html) that threads and processes share: opened, checked, written in transactions."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from hyperagent.errors import ConfigError, StorageError

_WAIT_S = 30.0
"""For others that write."""


class Database:
    """One connection; its threads take turns."""

    def __init__(self, path: Path, *, schema: str, version: int, what: str, remedy: str, synchronous: bool) -> None:
        """Open the file, or make it.

        Args:
            schema: statements that make an empty file's tables.
            version: of the schema, kept in the file.
            what: names the file in errors.
            remedy: how to mend a file that cannot be used.
            synchronous: whether a transaction is on the disk once it has ended.

        Raises:
            ConfigError: the file is of another version.
            StorageError: it is no SQLite file, or the file system refuses.
        """
        self._path, self._what, self._remedy = path, what, remedy
        self._lock = threading.Lock()
        with self._refusals():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            # Two that change the journal's mode at once do not wait for each other: SQLite answers "locked" at once.
            with self._refusals(), FileLock(f"{path}.lock", timeout=_WAIT_S):
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute(f"PRAGMA synchronous = {'FULL' if synchronous else 'NORMAL'}")
            self._make_or_check(schema, version)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the connection, once whoever is in a transaction has left it."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done inside happens, or, after an exception, nothing.

        Raises:
            StorageError: SQLite or the file system refused.
        """
        with self._lock, self._refusals():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _make_or_check(self, schema: str, version: int) -> None:
        with self.transaction() as connection:
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            if found == 0:
                for statement in filter(str.strip, schema.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version}")
            elif found != version:
                raise ConfigError(
                    f"{self._what} in {self._path} is of version {found}, this release reads {version}; {self._remedy}"
                )

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"{self._what} in {self._path} cannot be used: {error}; free some disk space, or {self._remedy}"
            ) from error
