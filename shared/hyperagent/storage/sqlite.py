"""A small SQLite file (https://www.sqlite.org/wal.html) that threads and processes share."""

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
"""How long a process waits for another one's transaction, which ends with a disk's answer."""


class Database:
    """One connection; its threads take turns, and one that is in a transaction may run further statements."""

    def __init__(
        self,
        path: Path,
        *,
        domain_error: Callable[[sqlite3.Error | OSError], HyperagentError],
        synchronous: bool,
        journal: Literal["WAL", "DELETE"] = "WAL",
    ) -> None:
        """Open the file; a new one is empty.

        Args:
            domain_error: the error that is raised in place of one of SQLite or the file system.
            synchronous: whether a transaction is on the disk once it has ended.

        Raises:
            HyperagentError: as `domain_error` says.
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
            version: of the schema, kept in the file.
            what: names the file in errors.
            remedy: what to do with a file that cannot be used.
            synchronous: whether a transaction is on the disk once it has ended.

        Raises:
            ConfigError: the file is of another version.
            StorageError: it is no SQLite file, or the file system refuses.
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
                    raise ConfigError(f"{what} in {path} is of version {found}, this release reads {version}; {remedy}")
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close the connection, once whoever is in a transaction has left it."""
        with self._lock:
            self._connection.close()

    def version(self) -> int:
        """Return the version of the schema that the file states; 0 if it is empty."""
        with self.connection() as connection:
            (found,) = connection.execute("PRAGMA user_version").fetchone()
        return int(found)

    def create_tables(self, schema: str, version: int) -> None:
        """Run the statements of `schema`, separated by semicolons, and state its version; all or nothing."""
        with self.transaction() as connection:
            for statement in filter(str.strip, schema.split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version}")

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Run statements, each a transaction of its own unless `transaction` surrounds them.

        Raises:
            HyperagentError: as `domain_error` says.
        """
        # An OSError inside is of something else that the caller does there.
        with self._lock, self._domain_errors(sqlite3.Error):
            yield self._connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock, against other processes too; everything done inside takes effect, or, after an exception, nothing.

        One inside another is a part of it.

        Raises:
            HyperagentError: as `domain_error` says; nothing has changed.
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
                # After some errors SQLite has rolled back by itself.
                if self._connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _set_journal(self, journal: str) -> None:
        (found,) = self._connection.execute("PRAGMA journal_mode").fetchone()
        if found == journal.lower():
            return
        # Two that change the journal's mode at once do not wait for each other: SQLite answers "locked" at once.
        with locked(Path(f"{self.path}.lock"), exclusive=True, wait_s=_WAIT_S):
            self._connection.execute(f"PRAGMA journal_mode = {journal}")

    @contextmanager
    def _domain_errors(self, *kinds: type[sqlite3.Error | OSError]) -> Iterator[None]:
        try:
            yield
        except kinds as error:
            raise self._domain_error(error) from error
