"""What became of one trajectory that was sent to be cached."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How a trajectory ended."""

    WRITTEN = "written"
    """Computed and written to the cache."""
    PRESENT = "present"
    """Was in the cache already."""
    REFUSED = "refused"
    """Cannot be scored; the others go on."""


@dataclass(frozen=True)
class PopulateOutcome:
    """One line of progress of PopulateCache."""

    trajectory_id: str
    outcome: Outcome
    num_rows: int
    """Supervised rows."""
    num_tokens: int
    """Tokens, context included."""
    cache_key: str = ""
    """Key of the cache record; empty when refused."""
    record_digest: str = ""
    """Digest (hex) that the record ends with; empty when refused."""
    reason: str = ""
    """Why, when refused."""
