"""The queue of runs, in SQLite: which runs wait, in order, and which run each idempotency key has started.

Everything else is in the runs' folders, from which a lost queue is built again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from hyperagent.storage.sqlite import Database

QUEUE_NAME = "runs.sqlite"

_VERSION = 1
_SCHEMA = """
CREATE TABLE runs (
    run_id TEXT NOT NULL PRIMARY KEY,
    idempotency_key TEXT UNIQUE,
    place INTEGER UNIQUE
) STRICT, WITHOUT ROWID;
"""


class RunQueue:
    """The queue of one runs folder; safe to call from many threads. Every method raises StorageError if it cannot be used."""

    def __init__(self, runs: Path) -> None:
        """Open the queue of the folder `runs`, or create it.

        Raises:
            ConfigError: it is of another release.
            StorageError: it is no SQLite file, or the file system refuses.
        """
        self._database = Database.open_or_create(
            runs / QUEUE_NAME,
            schema=_SCHEMA,
            version=_VERSION,
            what="the queue of the runs",
            remedy="remove the file: it is built again from the runs' folders",
            synchronous=True,
        )

    def close(self) -> None:
        self._database.close()

    def add(self, run_id: str, idempotency_key: str | None, *, make_folder: Callable[[], object]) -> None:
        """Add a new run at the end of the queue and make its folder, or do neither."""
        with self._database.transaction() as database:
            database.execute("INSERT INTO runs VALUES (?, ?, ?)", (run_id, idempotency_key, _end_of_queue(database)))
            make_folder()

    def restore(self, run_id: str, idempotency_key: str | None, *, waits: bool) -> None:
        """Add a run that only its folder knows; a run that is known already is left as it is."""
        with self._database.transaction() as database:
            place = _end_of_queue(database) if waits else None
            database.execute("INSERT OR IGNORE INTO runs VALUES (?, ?, ?)", (run_id, idempotency_key, place))

    def forget(self, run_id: str) -> None:
        """Remove a run whose folder is gone; its key may be used again."""
        with self._database.transaction() as database:
            database.execute("DELETE FROM runs WHERE run_id = ?", (run_id,))

    def ids(self) -> set[str]:
        """Return the ids of all known runs."""
        with self._database.transaction() as database:
            return {run_id for (run_id,) in database.execute("SELECT run_id FROM runs")}

    def started_with(self, idempotency_key: str) -> str | None:
        """Return the run that this key has started, if any."""
        with self._database.transaction() as database:
            row = database.execute("SELECT run_id FROM runs WHERE idempotency_key = ?", (idempotency_key,)).fetchone()
        return None if row is None else row[0]

    def waiting(self) -> list[str]:
        """Return the runs that wait, the next one first."""
        with self._database.transaction() as database:
            rows = database.execute("SELECT run_id FROM runs WHERE place IS NOT NULL ORDER BY place").fetchall()
        return [run_id for (run_id,) in rows]

    def enqueue(self, run_id: str) -> None:
        """Put a run that has run before at the end of the queue."""
        with self._database.transaction() as database:
            database.execute("UPDATE runs SET place = ? WHERE run_id = ?", (_end_of_queue(database), run_id))

    def dequeue(self, run_id: str) -> None:
        """Take a run out of the queue; one that does not wait is left as it is."""
        with self._database.transaction() as database:
            database.execute("UPDATE runs SET place = NULL WHERE run_id = ?", (run_id,))


def _end_of_queue(database: sqlite3.Connection) -> int:
    (place,) = database.execute("SELECT coalesce(max(place), 0) + 1 FROM runs").fetchone()
    return int(place)
