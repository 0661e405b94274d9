"""Hold out trajectories: whole repositories, and optionally whole tasks of training repositories; never single rows.

Trajectories of one repository share code and often the issue, so a split by row would leak.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Self

from blake3 import blake3
from pydantic import Field, model_validator

from hyperagent.config import StrictModel
from hyperagent.data.files.tokens_file import HELD_OUT, HELD_OUT_TASKS, TRAIN, VALIDATION
from hyperagent.data.pipeline.selection import RowFacts
from hyperagent.errors import DataError

_ISSUE_NUMBER = re.compile(r"(\d+)$")


class SplitSettings(StrictModel):
    """Fractions to hold out, and how to select what is held out."""

    held_out_share: float = Field(0.2, gt=0, lt=1)
    """Fraction of the repositories that training never sees and on which results are reported."""
    validation_share: float = Field(0.0, ge=0, lt=1)
    """Fraction of the repositories, none of them held out, that choose the checkpoint instead of being trained on.

    A result on the repositories that chose the checkpoint would be too good."""
    held_out_tasks_share: float = Field(0.0, ge=0, lt=1)
    """Fraction of each training repository's tasks that training never sees either."""
    by: Literal["hash", "time"] = "hash"
    """Selection of held-out tasks: by a hash, or the newest by issue number (at the end of the instance id)."""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> Self:
        if self.held_out_share + self.validation_share >= 1:
            raise ValueError("held_out_share and validation_share leave no repository for training; lower one of them")
        return self


def split_rows(rows: Sequence[RowFacts], settings: SplitSettings) -> dict[int, str]:
    """Return the split of every row, by row number.

    Raises:
        DataError: there are fewer repositories than splits, or a task has no issue number to order it by.
    """
    of_repo = assign_splits(
        [row.repo for row in rows],
        held_out_share=settings.held_out_share,
        validation_share=settings.validation_share,
        seed=settings.seed,
    )
    splits = {row.number: of_repo[row.repo] for row in rows}
    if settings.held_out_tasks_share:
        seen = [row for row in rows if of_repo[row.repo] == TRAIN]
        splits |= dict.fromkeys(_rows_of_held_out_tasks(seen, settings), HELD_OUT_TASKS)
    return splits


def assign_splits(
    repos: Collection[str], *, held_out_share: float, seed: int, validation_share: float = 0.0
) -> dict[str, str]:
    """Assign every repository to `TRAIN`, `HELD_OUT` or, with a `validation_share`, `VALIDATION`.

    The order of a keyed hash decides, so the split does not depend on the order of the rows. `validation_share` does
    not change which repositories are held out, unless so few are left that none would be for training. Each of the
    splits gets at least one repository.

    Args:
        held_out_share: fraction of the repositories to hold out, in (0, 1).
        validation_share: fraction of the repositories for validation, in [0, 1 - held_out_share).

    Raises:
        DataError: there are fewer repositories than splits.
    """
    distinct = sorted(set(repos), key=lambda repo: _draw(seed, repo))
    num_other_splits = 2 if validation_share else 1
    if len(distinct) <= num_other_splits:
        needed = "three of them with a validation share" if validation_share else "two of them"
        raise DataError(f"holding out repositories needs at least {needed}, but the data have {len(distinct)}")
    num_held_out = min(max(1, round(held_out_share * len(distinct))), len(distinct) - num_other_splits)
    num_validation = 0
    if validation_share:
        num_validation = min(max(1, round(validation_share * len(distinct))), len(distinct) - num_held_out - 1)
    sides = [HELD_OUT] * num_held_out + [VALIDATION] * num_validation
    return {repo: sides[place] if place < len(sides) else TRAIN for place, repo in enumerate(distinct)}


def require_no_leaked_text(
    rows: Sequence[RowFacts], splits: Mapping[int, str], sources_of: Mapping[str, Sequence[str]]
) -> None:
    """Check that no extra text shows a trajectory of another split, except of the train split.

    Args:
        splits: split by row number.
        sources_of: instance ids of the trajectories that a text holds, by the text's instance id.

    Raises:
        DataError: a text does.
    """
    splits_of: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits_of[row.instance_id].add(splits[row.number])
    for row in rows:
        own = splits[row.number]
        for source in sources_of.get(row.instance_id, ()):
            if leaked := splits_of.get(source, set()) - {own, TRAIN}:
                raise DataError(
                    f"the extra text of {row.instance_id} ({own}) holds a trajectory of {source} "
                    f"({' and '.join(sorted(leaked))}), so that split would be seen before it is evaluated; hold out "
                    "the newest tasks (--by time) if the texts hold earlier trajectories, or no tasks"
                )


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
