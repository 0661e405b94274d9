"""Which rows of a data file are used: by outcome, license and duplicates, and a sample of what is left."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from pydantic import Field

from hyperagent.config import StrictModel
from hyperagent.data.chat.messages import dialogue_of, issue_text, name_of, refused_as
from hyperagent.data.files.reader import Row, count_rows, read_rows_or_refusals
from hyperagent.errors import DataError, RowRefused
from hyperagent.progress import Progress, no_progress

NOT_SAMPLED = "not in the sample"
"""The reason by which rows that a sample passes over are counted."""


class Selection(StrictModel):
    """What a row must be like to be used."""

    resolved_only: bool = False
    """Only trajectories that solved their task."""
    exit_statuses: tuple[str, ...] = ()
    """Only these; none means all."""
    licenses: tuple[str, ...] = ()
    """Only tasks under these licenses, as the joined file spells them; none means all."""
    sample: int | None = Field(None, ge=2)
    """This many of the rows that are left, drawn by the seed."""
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class RowFacts:
    """What choosing and splitting rows needs to know of one."""

    number: int
    """From 0, in the file's order."""
    name: str
    repo: str
    instance_id: str
    resolved: bool
    exit_status: str
    issue: bytes
    """Digest of the issue's text."""


@dataclass(frozen=True)
class Selected:
    """The rows to use and what became of the others."""

    rows: tuple[RowFacts, ...]
    num_rows: int
    """In the file."""
    refused: tuple[RowRefused, ...]
    """Rows that cannot be used at all."""
    left_out: Mapping[str, int]
    """Number of rows by the reason for which they are not wanted."""


def select_rows(
    path: Path,
    selection: Selection,
    *,
    license_of: Mapping[str, str] | None = None,
    strict: bool = False,
    progress: Progress = no_progress,
) -> Selected:
    """Read a data file once and choose its rows.

    Args:
        license_of: license by instance id, needed if licenses are chosen by.
        strict: raise at the first row that cannot be used.

    Raises:
        DataError: the file cannot be read, a license is asked for and none is known, or no row is left.
        RowRefused: in strict mode.
    """
    if selection.licenses and license_of is None:
        raise DataError("rows carry no license; give a file that does with --licenses (instance_id and license_name)")
    facts: list[RowFacts] = []
    refused: list[RowRefused] = []
    names: set[str] = set()
    total = count_rows(path)
    for number, row in enumerate(read_rows_or_refusals(path)):
        progress(number, total)
        try:
            fact = _facts(row, number)
            if fact.name in names:
                raise RowRefused(fact.name, f"row {number} has the id of an earlier row")
        except RowRefused as refusal:
            if strict:
                raise
            refused.append(refusal)
            continue
        names.add(fact.name)
        facts.append(fact)
    progress(total, total)
    chosen, left_out = _choose(facts, selection, license_of or {})
    if not chosen:
        why = f"; the first refusal: {refused[0]}" if refused else ""
        raise DataError(
            f"no row of {path} is left ({len(refused)} of {total} refused, {sum(left_out.values())} not wanted){why}"
        )
    return Selected(tuple(chosen), total, tuple(refused), left_out)


def _facts(row: Row | RowRefused, number: int) -> RowFacts:
    if isinstance(row, RowRefused):
        raise row
    name = name_of(row, number)
    with refused_as(name):
        task = dialogue_of(row).task
    return RowFacts(
        number=number,
        name=name,
        repo=row["repo"],
        instance_id=str(row["instance_id"] or ""),
        resolved=bool(row["resolved"]),
        exit_status=str(row["exit_status"] or ""),
        # A task may hold half of a surrogate pair, for which its row will be refused later.
        issue=blake3(issue_text(task).encode("utf-8", "surrogatepass")).digest(),
    )


def _choose(
    facts: Sequence[RowFacts], selection: Selection, license_of: Mapping[str, str]
) -> tuple[list[RowFacts], dict[str, int]]:
    left_out: Counter[str] = Counter()
    repo_of_issue: dict[bytes, str] = {}
    chosen = []
    for fact in facts:
        if selection.resolved_only and not fact.resolved:
            left_out["not resolved"] += 1
        elif selection.exit_statuses and fact.exit_status not in selection.exit_statuses:
            left_out["another exit status"] += 1
        elif selection.licenses and license_of.get(fact.instance_id) not in selection.licenses:
            left_out["another license, or none known"] += 1
        elif repo_of_issue.setdefault(fact.issue, fact.repo) != fact.repo:
            left_out["issue of another repository"] += 1
        else:
            chosen.append(fact)
    if selection.sample is not None and selection.sample < len(chosen):
        drawn = sorted(random.Random(selection.seed).sample(range(len(chosen)), selection.sample))
        left_out[NOT_SAMPLED] = len(chosen) - len(drawn)
        chosen = [chosen[place] for place in drawn]
    return chosen, dict(left_out)
