"""Draw trajectories for the teacher check, and the repositories whose conditions they get."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperagent.data.files.tokens_rows import TokensRow, read_tokens_rows
from hyperagent.errors import DataError

_MAX_DONORS = 4
"""Number of repositories to try for a condition with which a trajectory stays within the limit of tokens."""


@dataclass(frozen=True)
class Draw:
    """A drawn trajectory, and trajectories of other repositories in the order in which they are tried."""

    row: TokensRow
    donors: tuple[TokensRow, ...]


def draw_rows(tokens: Path, *, rows: int, seed: int, split: str) -> list[Draw]:
    """Draw trajectories of a split, and for each one donors of distinct other repositories; in the file's order.

    Repositories take turns. Donors are of the same split if it has another repository.

    Raises:
        DataError: the tokens file cannot be used, has nothing in the split, or holds a single repository.
    """
    everything = read_tokens_rows(tokens)
    pool = _by_repo([row for row in everything if row.split == split])
    if not pool:
        splits = ", ".join(sorted({row.split for row in everything}))
        raise DataError(f"{tokens} has no trajectory in the {split} split, only in {splits}; name one of these")
    generator = random.Random(seed)
    queues = [generator.sample(of_repo, len(of_repo)) for _, of_repo in sorted(pool.items())]
    generator.shuffle(queues)
    in_turns = [queue[place] for place in range(max(map(len, queues))) for queue in queues if place < len(queue)]

    donors = pool if len(pool) > 1 else _by_repo(everything)
    draws = []
    for row in sorted(in_turns[:rows], key=lambda row: row.number):
        # Seeded by name, so that a trajectory gets the same donors in a larger sample.
        of_row = random.Random(f"{seed}:{row.trajectory_id}")
        others = sorted(set(donors) - {row.repo})
        if not others:
            raise DataError(f"{tokens} holds a single repository, so there is no foreign condition; add another one")
        repos = of_row.sample(others, min(_MAX_DONORS, len(others)))
        draws.append(Draw(row, tuple(of_row.choice(donors[repo]) for repo in repos)))
    return draws


def _by_repo(rows: Sequence[TokensRow]) -> dict[str, list[TokensRow]]:
    of_repo: dict[str, list[TokensRow]] = defaultdict(list)
    for row in rows:
        of_repo[row.repo].append(row)
    return dict(of_repo)
