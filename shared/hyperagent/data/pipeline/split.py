"""Hold out trajectories: whole repositories, and optionally whole tasks of the others; never single rows.

Trajectories of one repository share code and often the issue, so a split by row would leak.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Literal

from blake3 import blake3
from pydantic import Field

from hyperagent.config import StrictModel
from hyperagent.data.files.tokens_file import HELD_OUT, HELD_OUT_TASKS, TRAIN
from hyperagent.data.pipeline.selection import RowFacts
from hyperagent.errors import DataError

_ISSUE_NUMBER = re.compile(r"(\d+)$")


class SplitSettings(StrictModel):
    """Fractions to hold out, and how to select what is held out."""

    held_out_share: float = Field(0.2, gt=0, lt=1)
    """Fraction of the repositories that training never sees."""
    held_out_tasks_share: float = Field(0.0, ge=0, lt=1)
    """Fraction of each training repository's tasks that training never sees either."""
    by: Literal["hash", "time"] = "hash"
    """Selection of held-out tasks: by a hash, or the newest by issue number (at the end of the instance id)."""
    seed: int = Field(0, ge=0)


def split_rows(rows: Sequence[RowFacts], settings: SplitSettings) -> dict[int, str]:
    """Return the split of every row, by row number.

    Raises:
        DataError: there are fewer than two repositories, or a task has no issue number to order it by.
    """
    of_repo = assign_splits([row.repo for row in rows], held_out_share=settings.held_out_share, seed=settings.seed)
    splits = {row.number: of_repo[row.repo] for row in rows}
    if settings.held_out_tasks_share:
        seen = [row for row in rows if of_repo[row.repo] == TRAIN]
        splits |= dict.fromkeys(_rows_of_held_out_tasks(seen, settings), HELD_OUT_TASKS)
    return splits


def assign_splits(repos: Collection[str], *, held_out_share: float, seed: int) -> dict[str, str]:
    """Assign every repository to `TRAIN` or `HELD_OUT`.

    The order of a keyed hash decides, so the split does not depend on the order of the rows. Each side gets at least
    one repository.

    Args:
        held_out_share: fraction of the repositories to hold out, in (0, 1).

    Raises:
        DataError: there are fewer than two repositories.
    """
    distinct = sorted(set(repos), key=lambda repo: _draw(seed, repo))
    if len(distinct) < 2:
        raise DataError(f"holding out repositories needs at least two of them, but the data have {len(distinct)}")
    num_held_out = min(max(1, round(held_out_share * len(distinct))), len(distinct) - 1)
    return {repo: HELD_OUT if place < num_held_out else TRAIN for place, repo in enumerate(distinct)}


def _rows_of_held_out_tasks(rows: Sequence[RowFacts], settings: SplitSettings) -> list[int]:
    """Return the numbers of the rows whose task is held out.

    Attempts at one issue stay together, and every repository keeps at least one task for training.
    """
    tasks: dict[str, dict[bytes, list[RowFacts]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        tasks[row.repo][row.issue].append(row)
    numbers: list[int] = []
    for of_repo in tasks.values():
        if settings.by == "time":
            ordered = sorted(of_repo.values(), key=lambda task: (max(map(_issue_number, task)), task[0].issue))[::-1]
        else:
            ordered = sorted(of_repo.values(), key=lambda task: _draw(settings.seed, task[0].issue.hex()))
        num_held_out = min(round(settings.held_out_tasks_share * len(ordered)), len(ordered) - 1)
        numbers.extend(row.number for task in ordered[:num_held_out] for row in task)
    return numbers


def _issue_number(row: RowFacts) -> int:
    found = _ISSUE_NUMBER.search(row.instance_id)
    if found is None:
        raise DataError(
            f"row {row.name!r} has the instance id {row.instance_id!r}, which ends in no issue number to order tasks "
            "by; split with --by hash"
        )
    return int(found.group())


def _draw(seed: int, name: str) -> bytes:
    return blake3(f"{seed}:{name}".encode()).digest()
