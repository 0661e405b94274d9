"""Outcomes of PopulateCache, one per trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """Result of caching one trajectory."""

    WRITTEN = "written"
    """The trajectory was scored and written to the cache."""
    PRESENT = "present"
    """The trajectory was already in the cache."""
    REFUSED = "refused"
    """The trajectory cannot be scored; the call continues with the others."""


@dataclass(frozen=True)
class PopulateOutcome:
    """Outcome of one trajectory in PopulateCache."""

    trajectory_id: str
    outcome: Outcome
    num_rows: int
    """Number of supervised rows."""
    num_tokens: int
    """Number of tokens, context included."""
    cache_key: str = ""
    """Key of the cache record; empty if refused."""
    record_digest: str = ""
    """Digest (hex) at the end of the record; empty if refused."""
    reason: str = ""
    """Reason of a refusal; empty otherwise."""
