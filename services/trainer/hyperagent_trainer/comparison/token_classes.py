"""Assign each supervised token to a class: tool call, end of turn, or other text.

Tool calls are recognized by the tags `<tool_call>` and `</tool_call>`, which Qwen's and Hermes' templates write. In other
formats every token is text, and the exactness of tool calls is not reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import TokenizedTrajectory

TOOL_CALL, TEXT, END_OF_TURN = "tool call", "text", "end of turn"
CLASSES = (TOOL_CALL, TEXT, END_OF_TURN)
_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """Classes of one trajectory's N supervised tokens."""

    class_N: NDArray[np.int64]
    """Index into `CLASSES`."""
    calls: list[slice]
    """Supervised tokens of each tool call, tags included."""


def token_classes(trajectory: TokenizedTrajectory, tokenizer: ChatTokenizer) -> TokenClasses:
    """Classify the supervised tokens of a trajectory."""
    positions = trajectory.positions
    class_N = np.full(len(positions), CLASSES.index(TEXT))
    calls = []
    for turn in _turns(positions):
        class_N[turn.stop - 1] = CLASSES.index(END_OF_TURN)
        for call in _calls(trajectory.token_ids[positions[turn]], tokenizer):
            found = slice(turn.start + call.start, turn.start + call.stop)
            class_N[found] = CLASSES.index(TOOL_CALL)
            calls.append(found)
    return TokenClasses(class_N, calls)


def _turns(positions: NDArray[np.uint32]) -> list[slice]:
    """Return the runs of consecutive positions, which are the assistant's turns."""
    breaks = np.flatnonzero(np.diff(positions.astype(np.int64)) != 1) + 1
    bounds = [0, *breaks.tolist(), len(positions)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _calls(ids: NDArray[np.uint32], tokenizer: ChatTokenizer) -> list[slice]:
    """Return the tokens of each complete tool call of a turn."""
    pieces = [tokenizer.decode([int(token)]) for token in ids]
    text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces])
    found, place = [], 0
    while (start := text.find(_OPENING, place)) >= 0 and (stop := text.find(_CLOSING, start)) >= 0:
        place = stop + len(_CLOSING)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, place, side="left"))
        found.append(slice(first, last + 1))
    return found


def share_of_exact_calls(exact: Sequence[NDArray[np.bool_]], classes: Sequence[TokenClasses]) -> float | None:
    """Return the share of tool calls whose every token is the student's most likely one; None without tool calls.

    Args:
        exact: for every trajectory, whether the most likely id is the recorded one, shape [N].
    """
    found = [bool(row[call].all()) for row, one in zip(exact, classes, strict=True) for call in one.calls]
    return float(np.mean(found)) if found else None
