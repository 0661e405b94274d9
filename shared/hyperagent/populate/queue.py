"""The work queue's contract: trajectories to be scored, shared by many processes and nodes.

Delivery is at least once. Doing an item twice does no harm, since an item is its content and the cache is addressed
by content. An item that fails goes to the back of the queue; one that fails too often is quarantined with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

VANISHED = "its worker vanished"


@dataclass(frozen=True)
class WorkItem:
    """One trajectory to be scored."""

    item_id: str
    """Digest (hex) of its content."""
    row: int
    """Where it stands in the tokens file."""
    trajectory_id: str
    num_tokens: int
    num_rows: int
    """Supervised rows."""


@dataclass(frozen=True)
class Claim:
    """An item that a worker holds for the time of a lease."""

    item: WorkItem
    tries: int
    """This one included."""
    worker: str
    handle: str
    """What tells this claim from a later one of the same item."""


@dataclass(frozen=True)
class Finished:
    """What became of an item."""

    item: WorkItem
    outcome: str
    """An `Outcome` of the wire: written, present or refused."""
    reason: str = ""
    cache_key: str = ""
    record_digest: str = ""


@dataclass(frozen=True)
class Quarantined:
    """An item that failed too often."""

    item: WorkItem
    tries: int
    reason: str


@dataclass(frozen=True)
class QueueCounts:
    """Where a round stands."""

    pending: int
    claimed: int
    finished: int
    quarantined: int
    tokens_total: int
    tokens_over: int
    """Of items finished or quarantined."""

    @property
    def is_over(self) -> bool:
        """Nothing is left to do."""
        return self.pending == self.claimed == 0


class WorkQueue(Protocol):
    """Safe to use from several threads; each worker has a name of its own.

    Every method raises `StorageError` or `ServiceError` when what it is kept in refuses.
    """

    def fill(self, items: Iterable[WorkItem]) -> None:
        """Add what is not there. A round in progress is joined; if all is over a new one begins first, with every item
        pending again: who fills the cache again wants it checked."""

    def claim(self, worker: str) -> Claim | None:
        """The next item: one whose lease ran out, or a pending one; None if there is none now."""

    def renew(self, claim: Claim) -> bool:
        """Extend the lease; False if the claim is no longer held."""

    def finish(self, claim: Claim, finished: Finished) -> None:
        """The item is over, even if the claim has lapsed: whoever did it, the content is the same."""

    def fail(self, claim: Claim, reason: str) -> bool:
        """Return the item to the end of the queue, or quarantine it if it has failed too often.

        Returns:
            Whether it is quarantined; False too if the claim is no longer held, and nothing changes then.
        """

    def give_back(self, claim: Claim) -> None:
        """Back into the queue; the try does not count."""

    def counts(self) -> QueueCounts:
        """Where the round stands."""

    def finished(self) -> Iterator[Finished]:
        """What is finished, by row."""

    def quarantined(self) -> list[Quarantined]:
        """List the quarantined items, by row."""

    def close(self) -> None:
        """Let go of what it is kept in."""
