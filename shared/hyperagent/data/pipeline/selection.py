"""Select rows of a data file by outcome, license and duplicates, and sample from the rest."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from pydantic import Field

from hyperagent.config import StrictModel
from hyperagent.data.chat.messages import dialogue_of, issue_text, name_of, refused_as
from hyperagent.data.files.columns import Row
from hyperagent.data.files.reader import count_rows, read_rows_or_refusals
from hyperagent.errors import DataError, RowRefused
from hyperagent.progress import Progress, no_progress

NOT_SAMPLED = "not in the sample"
"""Reason under which rows that were not drawn into the sample are counted."""


_TRUTH: dict[Any, bool] = {
    1: True,
    0: False,
    "true": True,
    "false": False,
    "1": True,
    "0": False,
    "1.0": True,
    "0.0": False,
}
NO_EXTRA_TEXT = "no extra text"
"""Reason under which rows that need an extra text and have none are counted."""


class Selection(StrictModel):
    """Criteria that a row must meet to be used."""

    resolved_only: bool = False
    """Use only trajectories that solved their task."""
    exit_statuses: tuple[str, ...] = ()
    """Use only rows with these exit statuses; empty means all."""
    licenses: tuple[str, ...] = ()
    """Use only tasks under these licenses, spelled as in the joined file; empty means all."""
    sample: int | None = Field(None, ge=2)
    """Number of rows to draw from the remaining ones, by the seed."""
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class RowFacts:
    """Facts about a row that selecting and splitting need."""

    number: int
    """Row number, from 0, in the file's order."""
    name: str
    repo: str
    instance_id: str
    resolved: bool
    """False also if the row does not say."""
    exit_status: str
    issue: bytes
    """Digest of the issue's text."""


@dataclass(frozen=True)
class Selected:
    """The selected rows, and the reasons why others were not selected."""

    rows: tuple[RowFacts, ...]
    num_rows: int
    """Number of rows in the file."""
    refused: tuple[RowRefused, ...]
    """Refusals of rows that cannot be used."""
    left_out: Mapping[str, int]
    """Number of usable rows that were not selected, by reason."""


def select_rows(
    path: Path,
    selection: Selection,
    license_of: Mapping[str, str] | None = None,
    extra_of: Mapping[str, str] | None = None,
    *,
    strict: bool = False,
    progress: Progress = no_progress,
) -> Selected:
    """Read a data file once and select rows.

    Args:
        license_of: license by instance id; required if `selection` restricts licenses.
        extra_of: extra text by instance id, if rows need one; then a sample is drawn from the rows that have one.
        strict: raise at the first row that cannot be used.
        progress: called with (rows done, rows in the file).

    Raises:
        DataError: the file cannot be read, licenses are restricted but `license_of` is missing, or no row is left.
        RowRefused: in strict mode.
    """
    if selection.licenses and license_of is None:
        raise DataError("rows have no license; give a file with instance_id and license_name with --licenses")
    facts: list[RowFacts] = []
    refused: list[RowRefused] = []
    names: set[str] = set()
    total = count_rows(path)
    for number, row in enumerate(read_rows_or_refusals(path)):
        progress(number, total)
        try:
            fact = _facts(row, number, needs_resolved=selection.resolved_only)
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
    chosen, left_out = _choose(facts, selection, license_of or {}, extra_of)
    if not chosen:
        why = f"; the first refusal: {refused[0]}" if refused else ""
        raise DataError(
            f"no row of {path} is left ({len(refused)} of {total} refused, {sum(left_out.values())} not selected){why}"
        )
    return Selected(tuple(chosen), total, tuple(refused), left_out)


def _facts(row: Row | RowRefused, number: int, *, needs_resolved: bool) -> RowFacts:
    if isinstance(row, RowRefused):
        raise row
    name = name_of(row, number)
    with refused_as(name):
        return _usable_facts(row, name, number, needs_resolved=needs_resolved)


def _usable_facts(row: Row, name: str, number: int, *, needs_resolved: bool) -> RowFacts:
    task = dialogue_of(row).task
    return RowFacts(
        number=number,
        name=name,
        repo=row["repo"],
        instance_id=_word(row["instance_id"], "instance_id"),
        resolved=_is_resolved(row["resolved"], is_needed=needs_resolved),
        exit_status=_word(row["exit_status"], "exit_status"),
        # A task may hold half of a surrogate pair; its row is refused later.
        issue=blake3(issue_text(task).encode("utf-8", "surrogatepass")).digest(),
    )


def _is_missing(value: Any) -> bool:
    # pandas writes a missing value as NaN.
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_resolved(value: Any, *, is_needed: bool) -> bool:
    """Return whether a row is marked as resolved; a missing mark means that it is not.

    Raises:
        DataError: the mark decides about the row, and is neither true nor false.
    """
    if _is_missing(value):
        return False
    key = value.strip().lower() if isinstance(value, str) else value
    truth = _TRUTH.get(key) if isinstance(key, str | int | float) else None
    if truth is None and is_needed:
        raise DataError(f"its resolved is {value!r}, which is neither true nor false; write true, false, 1 or 0")
    return bool(truth)


def _word(value: Any, column: str) -> str:
    """Return a column's text, "" for a missing one; a whole number is written out.

    Raises:
        DataError: the value is neither text nor a whole number.
    """
    if _is_missing(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"its {column} is {value!r}, not text")
    return str(value)


def _choose(
    facts: Sequence[RowFacts],
    selection: Selection,
    license_of: Mapping[str, str],
    extra_of: Mapping[str, str] | None,
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
    if selection.sample is not None and extra_of is not None:
        with_extra = [fact for fact in chosen if fact.instance_id in extra_of]
        left_out[NO_EXTRA_TEXT] = len(chosen) - len(with_extra)
        chosen = with_extra
    if selection.sample is not None and selection.sample < len(chosen):
        drawn = sorted(random.Random(selection.seed).sample(range(len(chosen)), selection.sample))
        left_out[NOT_SAMPLED] = len(chosen) - len(drawn)
        chosen = [chosen[place] for place in drawn]
    return chosen, dict(left_out)
