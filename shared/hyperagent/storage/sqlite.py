"""Access a small SQLite file (https://www.sqlite.org/wal.html) that threads and processes share."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from hyperagent.errors import ConfigError, HyperagentError, StorageError
from hyperagent.storage.file_lock import locked

_WAIT_S = 60.0
"""Seconds that a process waits for another process's transaction, which may be waiting for the disk."""


class Database:
    """One connection that threads use in turn; a thread inside a transaction may run further statements."""

    def __init__(
        self,
        path: Path,
        *,
        domain_error: Callable[[sqlite3.Error | OSError], HyperagentError],
        synchronous: bool,
        journal: Literal["WAL", "DELETE"] = "WAL",
    ) -> None:
        """Open the file, or create an empty one.

        Args:
            domain_error: converts an error of SQLite or the file system to the error that is raised instead.
            synchronous: whether a transaction is on the disk once it has ended.
            journal: SQLite's journal mode.

        Raises:
            HyperagentError: SQLite or the file system failed; the result of `domain_error`.
        """
        self.path = path
        self._domain_error = domain_error
        self._lock = threading.RLock()
        with self._domain_errors(sqlite3.Error, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
            try:
                self._set_journal(journal)
                self._connection.execute(f"PRAGMA synchronous = {'FULL' if synchronous else 'NORMAL'}")
            except BaseException:
                self._connection.close()
                raise

    @classmethod
    def open_or_create(
        cls, path: Path, *, schema: str, version: int, what: str, remedy: str, synchronous: bool
    ) -> Self:
        """Open the file, or create it with the tables of `schema`.

        Args:
            version: version of the schema, stored in the file.
            what: name of the file's kind for error messages.
            remedy: how to fix a file that cannot be used, for error messages.
            synchronous: whether a transaction is on the disk once it has ended.

        Raises:
            ConfigError: the file has another version of the schema.
            StorageError: the file is not an SQLite file, or the file system refuses.
        """

        def refusal(error: sqlite3.Error | OSError) -> StorageError:
            return StorageError(f"{what} in {path} cannot be used: {error}; free some disk space, or {remedy}")

        database = cls(path, domain_error=refusal, synchronous=synchronous)
        try:
            with database.transaction():
                found = database.version()
                if found == 0:
                    database.create_tables(schema, version)
                elif found != version:
                    raise ConfigError(
                        f"{what} in {path} has version {found}, but this release reads version {version}; {remedy}"
                    )
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close the connection once no thread is in a transaction."""
        with self._lock:
            self._connection.close()

    def version(self) -> int:
        """Return the version of the schema that is stored in the file; 0 if the file is empty."""
        with self.connection() as connection:
            (found,) = connection.execute("PRAGMA user_version").fetchone()
        return int(found)

    def create_tables(self, schema: str, version: int) -> None:
        """Run the statements of `schema`, separated by semicolons, and store its version, all in one transaction."""
        with self.transaction() as connection:
            for statement in filter(str.strip, schema.split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version}")

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection; each statement is a separate transaction unless it is inside `transaction`.

        Raises:
            HyperagentError: SQLite failed; the result of `domain_error`.
        """
        # An OSError inside the block comes from other work of the caller, not from SQLite.
        with self._lock, self._domain_errors(sqlite3.Error):
            yield self._connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection inside a transaction that holds the write lock, also against other processes.

        All statements take effect, or none after an exception. A transaction inside another one becomes a part of it.

        Raises:
            HyperagentError: SQLite failed, and nothing has changed; the result of `domain_error`.
        """
        with self.connection() as connection:
            is_nested = connection.in_transaction
            if is_nested:
                yield connection
                return
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # After some errors SQLite has already rolled back.
                if self._connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _set_journal(self, journal: str) -> None:
        (found,) = self._connection.execute("PRAGMA journal_mode").fetchone()
        if found == journal.lower():
            return
        # Processes that change the journal mode concurrently do not wait for each other: SQLite fails with "locked" at once.
        with locked(Path(f"{self.path}.lock"), exclusive=True, wait_s=_WAIT_S):
            self._connection.execute(f"PRAGMA journal_mode = {journal}")

    @contextmanager
    def _domain_errors(self, *kinds: type[sqlite3.Error | OSError]) -> Iterator[None]:
        try:
            yield
        except kinds as error:
            raise self._domain_error(error) from error
