"""Work queue in an SQLite file, for workers on one machine (SQLite's locks are not safe on network file systems).

Every change is one transaction that takes the write lock at its start, so two workers never see the same pending item.
Leases use the machine's clock, which all its processes share.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hyperagent.populate.queue import VANISHED, Claim, Finished, Quarantined, QueueCounts, WorkItem
from hyperagent.storage.sqlite import Database

_VERSION = 1
_QUARANTINED = "set_aside"
"""Name of the quarantined state in files of version 1."""
_SCHEMA = f"""
CREATE TABLE items (
    queue TEXT NOT NULL,
    item_id TEXT NOT NULL,
    row INTEGER NOT NULL,
    trajectory_id TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'claimed', 'finished', '{_QUARANTINED}')),
    tries INTEGER NOT NULL DEFAULT 0,
    handle TEXT NOT NULL DEFAULT '',
    lease_until REAL NOT NULL DEFAULT 0,
    outcome TEXT NOT NULL DEFAULT '',
    reason TEXT NOT NULL DEFAULT '',
    cache_key TEXT NOT NULL DEFAULT '',
    record_digest TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (queue, item_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX by_turn ON items (queue, state, tries, row);
"""
_ITEM = "item_id, row, trajectory_id, num_tokens, num_rows"
_ITEM_FIELDS = 5


class SqliteQueue:
    """A `WorkQueue` in a file."""

    def __init__(self, path: Path, *, name: str, max_tries: int, lease_s: float) -> None:
        """Open the file; create it if it does not exist.

        Args:
            name: distinguishes this population from others in the same file.
            max_tries: how often an item may fail before it is quarantined.
            lease_s: how long a claim is held without being renewed.

        Raises:
            ConfigError: the file has another version.
            StorageError: it is not an SQLite file, or a file operation failed.
        """
        self._name, self._max_tries, self._lease_s = name, max_tries, lease_s
        # Losing the last changes in a power failure only means repeating some items, which is harmless.
        self._database = Database.open_or_create(
            path,
            schema=_SCHEMA,
            version=_VERSION,
            what="the queue",
            remedy="remove the file; the rows in the cache are kept",
            synchronous=False,
        )

    def fill(self, items: Iterable[WorkItem]) -> None:
        """See `WorkQueue.fill`."""
        rows = [(self._name, i.item_id, i.row, i.trajectory_id, i.num_tokens, i.num_rows) for i in items]
        with self._database.transaction() as database:
            left = database.execute(
                "SELECT count(*) FROM items WHERE queue = ? AND state IN ('pending', 'claimed')", (self._name,)
            ).fetchone()[0]
            if not left:
                database.execute("DELETE FROM items WHERE queue = ?", (self._name,))
            database.executemany(f"INSERT OR IGNORE INTO items (queue, {_ITEM}) VALUES (?, ?, ?, ?, ?, ?)", rows)

    def claim(self, worker: str) -> Claim | None:
        """See `WorkQueue.claim`."""
        now = time.time()
        with self._database.transaction() as database:
            lapsed = "WHERE queue = ? AND state = 'claimed' AND lease_until < ?"
            database.execute(
                f"UPDATE items SET state = '{_QUARANTINED}', reason = ? || ' ' || tries || ' times' {lapsed} AND tries >= ?",
                (VANISHED, self._name, now, self._max_tries),
            )
            database.execute(f"UPDATE items SET state = 'pending' {lapsed}", (self._name, now))
            found = database.execute(
                f"SELECT {_ITEM}, tries FROM items WHERE queue = ? AND state = 'pending' ORDER BY tries, row LIMIT 1",
                (self._name,),
            ).fetchone()
            if found is None:
                return None
            claim = Claim(WorkItem(*found[:_ITEM_FIELDS]), found[-1] + 1, worker, handle=uuid.uuid4().hex)
            database.execute(
                "UPDATE items SET state = 'claimed', tries = ?, handle = ?, lease_until = ? "
                "WHERE queue = ? AND item_id = ?",
                (claim.tries, claim.handle, now + self._lease_s, self._name, claim.item.item_id),
            )
            return claim

    def renew(self, claim: Claim) -> bool:
        """See `WorkQueue.renew`."""
        return self._change_held(claim, "lease_until = ?", time.time() + self._lease_s)

    def finish(self, claim: Claim, finished: Finished) -> None:
        """See `WorkQueue.finish`."""
        result = (finished.outcome, finished.reason, finished.cache_key, finished.record_digest)
        with self._database.transaction() as database:
            database.execute(
                "UPDATE items SET state = 'finished', outcome = ?, reason = ?, cache_key = ?, record_digest = ? "
                "WHERE queue = ? AND item_id = ? AND state != 'finished'",
                (*result, self._name, claim.item.item_id),
            )

    def fail(self, claim: Claim, reason: str) -> bool:
        """See `WorkQueue.fail`."""
        if claim.tries >= self._max_tries:
            return self._change_held(claim, f"state = '{_QUARANTINED}', reason = ?", reason)
        self._change_held(claim, "state = 'pending', reason = ?", reason)
        return False

    def give_back(self, claim: Claim) -> None:
        """See `WorkQueue.give_back`."""
        self._change_held(claim, "state = 'pending', tries = ?", claim.tries - 1)

    def counts(self) -> QueueCounts:
        """See `WorkQueue.counts`."""
        with self._database.transaction() as database:
            found = database.execute(
                "SELECT state, count(*), sum(num_tokens) FROM items WHERE queue = ? GROUP BY state", (self._name,)
            ).fetchall()
        number = {state: count for state, count, _ in found}
        tokens = {state: total for state, _, total in found}
        return QueueCounts(
            pending=number.get("pending", 0),
            claimed=number.get("claimed", 0),
            finished=number.get("finished", 0),
            quarantined=number.get(_QUARANTINED, 0),
            tokens_total=sum(tokens.values()),
            tokens_over=tokens.get("finished", 0) + tokens.get(_QUARANTINED, 0),
        )

    def finished(self) -> Iterator[Finished]:
        """See `WorkQueue.finished`."""
        for row in self._in_state("finished", "outcome, reason, cache_key, record_digest"):
            yield Finished(WorkItem(*row[:_ITEM_FIELDS]), *row[_ITEM_FIELDS:])

    def quarantined(self) -> list[Quarantined]:
        """See `WorkQueue.quarantined`."""
        found = self._in_state(_QUARANTINED, "tries, reason")
        return [Quarantined(WorkItem(*row[:_ITEM_FIELDS]), *row[_ITEM_FIELDS:]) for row in found]

    def close(self) -> None:
        """See `WorkQueue.close`."""
        self._database.close()

    def _in_state(self, state: str, columns: str) -> list[tuple[Any, ...]]:
        query = f"SELECT {_ITEM}, {columns} FROM items WHERE queue = ? AND state = ? ORDER BY row"
        with self._database.transaction() as database:
            found: list[tuple[Any, ...]] = database.execute(query, (self._name, state)).fetchall()
        return found

    def _change_held(self, claim: Claim, change: str, value: object) -> bool:
        with self._database.transaction() as database:
            changed = database.execute(
                f"UPDATE items SET {change} WHERE queue = ? AND item_id = ? AND state = 'claimed' AND handle = ?",
                (value, self._name, claim.item.item_id, claim.handle),
            )
        return changed.rowcount == 1
