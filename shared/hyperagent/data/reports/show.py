"""Split one view of a row into segments of one speaker and one mask value, for display."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hyperagent.data.chat.mask_by_scanning import turn_shape
from hyperagent.data.chat.messages import dialogue_of, name_of, refused_as
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.columns import Row
from hyperagent.data.files.reader import read_rows_or_refusals
from hyperagent.data.files.tokens_file import TokenizedTrajectory
from hyperagent.data.pipeline.views import ViewMaker, ViewSettings
from hyperagent.errors import NotFound, RowRefused

# Maximum number of tokens in a role's name, if the tokenizer has no single token for it.
_LONGEST_ROLE = 16

View = Literal["teacher", "condition", "student"]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one speaker that are all supervised or all unsupervised."""

    role: str
    """Role in the template's header; some templates put tools' results in a user turn."""
    supervised: bool
    first_token: int
    num_tokens: int
    text: str


def find_row(path: Path, wanted: str) -> tuple[int, Row]:
    """Find a row by its id, or by its number from 0.

    Returns:
        The row's number and the row.

    Raises:
        NotFound: the file has no such row.
        RowRefused: the line with that number is not a row.
    """
    by_number: tuple[int, Row] | RowRefused | None = None
    for number, row in enumerate(read_rows_or_refusals(path)):
        if not isinstance(row, RowRefused) and name_of(row, number) == wanted:
            return number, row
        if wanted in (str(number), f"row {number}"):
            by_number = row if isinstance(row, RowRefused) else (number, row)
    if by_number is None:
        raise NotFound(f"{path} has no row {wanted!r}; give a trajectory_id, or a number from 0")
    if isinstance(by_number, RowRefused):
        raise by_number
    return by_number


def show_row(
    row: Row, number: int, tokenizer: ChatTokenizer, *, settings: ViewSettings, view: View, extra: str | None
) -> list[Segment]:
    """Return the segments of one view of a row.

    Raises:
        RowRefused: the row cannot be used.
    """
    maker = ViewMaker(tokenizer)
    name = name_of(row, number)
    with refused_as(name):
        trajectory = maker.make(name, row["repo"], "", dialogue_of(row), settings=settings, extra=extra)
    ids, positions = _of_view(trajectory, view)
    return segments(ids, positions, tokenizer)


def segments(ids: NDArray[np.uint32], positions: NDArray[np.uint32], tokenizer: ChatTokenizer) -> list[Segment]:
    """Split `ids` [T] where a turn opens and where the mask, given by `positions` [N], changes."""
    supervised = np.zeros(len(ids), dtype=bool)
    supervised[positions] = True
    opens = ids == turn_shape(tokenizer).opening[0][0]
    opens[:1] = True
    cuts = np.flatnonzero(opens | np.diff(supervised, prepend=supervised[:1])).tolist()
    found: list[Segment] = []
    role = ""
    for start, stop in pairwise([*cuts, len(ids)]):
        if opens[start]:
            header = tokenizer.control.split(tokenizer.decode(ids[start + 1 : start + 1 + _LONGEST_ROLE].tolist()))[0]
            role = header.split(maxsplit=1)[0] if header.split() else ""
        text = tokenizer.decode(ids[start:stop].tolist())
        found.append(Segment(role, bool(supervised[start]), start, stop - start, text))
    return found


def _of_view(trajectory: TokenizedTrajectory, view: View) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    if view == "condition":
        return trajectory.prompt_ids, np.empty(0, dtype=np.uint32)
    if view == "student":
        return trajectory.student_ids, trajectory.student_positions
    return trajectory.token_ids, trajectory.positions
