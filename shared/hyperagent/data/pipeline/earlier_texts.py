"""Make extra texts from earlier trajectories of the same repository: how its issues were worked on before.

The text of a task never holds a trajectory of the same issue, nor one of a later issue: when an adapter is made for a
new issue, only earlier ones exist.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from hyperagent.config import StrictModel
from hyperagent.data.chat.messages import dialogue_of, refused_as
from hyperagent.data.files.reader import read_rows_or_refusals
from hyperagent.data.files.shards import JSON_LINES
from hyperagent.data.pipeline.condensed import condensed
from hyperagent.data.pipeline.selection import RowFacts, Selection, select_rows
from hyperagent.errors import DataError, RowRefused
from hyperagent.progress import Progress, no_progress
from hyperagent.storage.files import new_file

_LEAST_CHARACTERS = 200
_ISSUE_NUMBER = re.compile(r"(\d+)$")


class EarlierSettings(StrictModel):
    """How much of the past an extra text holds."""

    trajectories: int = Field(1, ge=1, le=8)
    """Maximum number of earlier trajectories, each of another issue; the latest ones are taken."""
    max_characters: int = Field(16_000, ge=1)
    """Maximum length of a text; the trajectories share it equally. Four characters are about one token."""

    @model_validator(mode="after")
    def _room_for_each(self) -> Self:
        if self.max_characters < _LEAST_CHARACTERS * self.trajectories:
            raise ValueError(
                f"{self.trajectories} earlier trajectories need {_LEAST_CHARACTERS * self.trajectories} characters to "
                "say anything; raise max_characters or take fewer"
            )
        return self


@dataclass(frozen=True)
class EarlierReport:
    """Counts of the texts written."""

    texts: int
    """Number of tasks with a text."""
    trajectories: int
    """Number of trajectories in all texts together."""
    characters: int
    """Number of characters of all texts together."""
    without_earlier: tuple[str, ...]
    """Instance ids of the tasks without an earlier issue in their repository; they have no text."""
    without_instance: int
    """Number of usable rows without an instance id, by which a text could be joined."""
    refused: tuple[RowRefused, ...]
    """Refusals of rows that cannot be used."""


def write_earlier_texts(
    source: Path,
    out: Path,
    settings: EarlierSettings,
    *,
    reading: Progress = no_progress,
    condensing: Progress = no_progress,
) -> EarlierReport:
    """Write a JSON Lines file of `instance_id`, `text` and `sources` for the tasks of a data file, atomically.

    `sources` lists the instance ids of the trajectories in the text. Memory holds one condensed trajectory per task,
    each at most as long as a text.

    Args:
        source: data file.
        out: file to write, named *.jsonl.
        reading: called with (rows read, rows of the file).
        condensing: called with (texts of trajectories made, texts to make).

    Raises:
        DataError: the file is unusable, `out` is not named *.jsonl, an instance id is used in two repositories, or no
            task has an earlier one.
        StorageError: a file system operation failed.
    """
    if out.suffix != JSON_LINES:
        raise DataError(f"{out} is written as JSON Lines; choose a name that ends in {JSON_LINES}")
    selected = select_rows(source, Selection(), progress=reading)
    named = [fact for fact in selected.rows if fact.instance_id]
    earlier = earlier_rows(named, trajectories=settings.trajectories)
    with_text = {instance: facts for instance, facts in earlier.items() if facts}
    if not with_text:
        raise DataError(
            f"no task of {source} has an earlier one in its repository, so there is no extra text to make; use a file "
            "with several issues per repository"
        )
    texts = _condense(source, with_text, settings, condensing)
    characters = 0
    with new_file(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for instance, facts in with_text.items():
            text = "\n\n".join(texts[fact.number] for fact in facts)
            sources = [fact.instance_id for fact in facts]
            characters += len(text)
            file.write(json.dumps({"instance_id": instance, "text": text, "sources": sources}) + "\n")
    return EarlierReport(
        texts=len(with_text),
        trajectories=sum(map(len, with_text.values())),
        characters=characters,
        without_earlier=tuple(instance for instance, facts in earlier.items() if not facts),
        without_instance=len(selected.rows) - len(named),
        refused=selected.refused,
    )


def earlier_rows(rows: Sequence[RowFacts], *, trajectories: int) -> dict[str, tuple[RowFacts, ...]]:
    """Return for every instance id the rows of the latest earlier issues of its repository, the oldest first.

    Issues are ordered by the number at the end of the instance id; in a repository where an id has none, by their
    first row. An issue that was tried several times is represented by its first row that solved it, else its first.

    Raises:
        DataError: an instance id is used in two repositories.
    """
    repo_of: dict[str, str] = {}
    by_repo: dict[str, list[RowFacts]] = defaultdict(list)
    for row in rows:
        if repo_of.setdefault(row.instance_id, row.repo) != row.repo:
            raise DataError(
                f"the instance {row.instance_id} is in two repositories, {repo_of[row.instance_id]} and {row.repo}, so "
                "texts cannot be joined by it; rename one of the two"
            )
        by_repo[row.repo].append(row)
    found: dict[str, tuple[RowFacts, ...]] = dict.fromkeys(repo_of, ())
    for of_repo in by_repo.values():
        found |= _earlier_in_repo(of_repo, trajectories)
    return found


def _earlier_in_repo(rows: Sequence[RowFacts], trajectories: int) -> dict[str, tuple[RowFacts, ...]]:
    numbers = [_ISSUE_NUMBER.search(row.instance_id) for row in rows]
    ages = [int(number.group()) for number in numbers if number] if all(numbers) else [row.number for row in rows]
    issue_of: dict[str, set[bytes]] = defaultdict(set)
    age_of: dict[str, int] = {}
    attempt_at: dict[bytes, RowFacts] = {}
    age_of_issue: dict[bytes, int] = {}
    for row, age in zip(rows, ages, strict=True):
        issue_of[row.instance_id].add(row.issue)
        age_of[row.instance_id] = min(age, age_of.get(row.instance_id, age))
        # An issue under two ids is as late as the later one, so it is no source for what lies between them.
        age_of_issue[row.issue] = max(age, age_of_issue.get(row.issue, age))
        best = attempt_at.setdefault(row.issue, row)
        if row.resolved and not best.resolved:
            attempt_at[row.issue] = row
    ordered = sorted(attempt_at, key=lambda issue: (age_of_issue[issue], attempt_at[issue].number))
    found = {}
    for instance, age in age_of.items():
        past = [issue for issue in ordered if age_of_issue[issue] < age and issue not in issue_of[instance]]
        found[instance] = tuple(attempt_at[issue] for issue in past[-trajectories:])
    return found


def _condense(
    source: Path, wanted: Mapping[str, Sequence[RowFacts]], settings: EarlierSettings, progress: Progress
) -> dict[int, str]:
    """Return the condensed trajectories of all wanted rows, by row number, in one pass over the file."""
    # Two line breaks separate the trajectories of a text.
    budget = settings.max_characters // settings.trajectories - 2
    names = {fact.number: fact.name for facts in wanted.values() for fact in facts}
    texts: dict[int, str] = {}
    for number, row in enumerate(read_rows_or_refusals(source)):
        if number in names:
            assert not isinstance(row, RowRefused)
            with refused_as(names[number]):
                texts[number] = condensed(dialogue_of(row), max_characters=budget)
            progress(len(texts), len(names))
    return texts
