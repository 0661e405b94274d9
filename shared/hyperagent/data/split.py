"""Which trajectories are held out: whole repositories, chosen by a hash, never single rows.

Trajectories of one repository share code and often the issue, so a split by row would leak.
"""

from __future__ import annotations

from collections.abc import Collection

from blake3 import blake3

from hyperagent.data.tokens import HELD_OUT, TRAIN
from hyperagent.errors import DataError


def assign_splits(repos: Collection[str], *, held_out_share: float, seed: int) -> dict[str, str]:
    """Assign every repository to `TRAIN` or `HELD_OUT`.

    The order of a keyed hash decides, so the same repositories give the same split in any order of reading, and
    there is at least one repository on each side.

    Args:
        held_out_share: share of the repositories to hold out, in (0, 1).

    Raises:
        DataError: there are fewer than two repositories.
    """
    distinct = sorted(set(repos), key=lambda repo: blake3(f"{seed}:{repo}".encode()).digest())
    if len(distinct) < 2:
        raise DataError(f"holding repositories out needs at least two of them, the data have {len(distinct)}")
    num_held_out = min(max(1, round(held_out_share * len(distinct))), len(distinct) - 1)
    return {repo: HELD_OUT if place < num_held_out else TRAIN for place, repo in enumerate(distinct)}
