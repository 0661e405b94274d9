"""Interface of the work queue: trajectories to be scored, shared by many processes and nodes.

Delivery is at least once. Processing an item twice is harmless, because items are identified by their content and the
cache is content-addressed. A failed item returns to the end of the queue; one that fails too often is quarantined with
the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

VANISHED = "its worker vanished"


@dataclass(frozen=True)
class WorkItem:
    """A trajectory to be scored."""

    item_id: str
    """Digest (hex) of the trajectory's content."""
    row: int
    """Row number in the tokens file."""
    trajectory_id: str
    num_tokens: int
    num_rows: int
    """Number of supervised rows."""


@dataclass(frozen=True)
class Claim:
    """An item that a worker holds for the duration of a lease."""

    item: WorkItem
    tries: int
    """Number of tries, including this one."""
    worker: str
    handle: str
    """Value that distinguishes this claim from later claims of the same item."""


@dataclass(frozen=True)
class Finished:
    """Result of an item."""

    item: WorkItem
    outcome: str
    """Outcome as in the teacher's protocol: written, present or refused."""
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
    """Progress of a round."""

    pending: int
    claimed: int
    finished: int
    quarantined: int
    tokens_total: int
    tokens_over: int
    """Number of tokens in finished or quarantined items."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.pending == self.claimed == 0


class WorkQueue(Protocol):
    """Thread-safe work queue; each worker uses a unique name.

    Every method raises `StorageError` or `ServiceError` if the underlying storage fails.
    """

    def fill(self, items: Iterable[WorkItem]) -> None:
        """Add new items, joining a round in progress.

        If the previous round is over, a new one begins with every item pending again, so that filling a complete cache
        again checks it.
        """

    def claim(self, worker: str) -> Claim | None:
        """Claim the next item, which is one with an expired lease or a pending one; return None if there is none now."""

    def renew(self, claim: Claim) -> bool:
        """Extend the lease; return False if the claim is no longer held."""

    def finish(self, claim: Claim, finished: Finished) -> None:
        """Mark the item as finished, even if the claim has expired, because the result is the same for every worker."""

    def fail(self, claim: Claim, reason: str) -> bool:
        """Return the item to the end of the queue, or quarantine it if it has failed too often.

        Returns:
            Whether the item was quarantined; also False, without any change, if the claim is no longer held.
        """

    def give_back(self, claim: Claim) -> None:
        """Return the item to the queue without counting the try."""

    def counts(self) -> QueueCounts:
        """Where the round stands."""

    def finished(self) -> Iterator[Finished]:
        """Iterate over the finished items in the order of their rows."""

    def quarantined(self) -> list[Quarantined]:
        """Return the quarantined items in the order of their rows."""

    def close(self) -> None:
        """Close the underlying storage."""
