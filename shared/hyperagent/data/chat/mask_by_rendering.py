"""Find the assistant's text by rendering: the first of two independent methods (see `mask_by_scanning`).

The conversation is rendered with the generation prompt before each assistant turn, and again after the turn; the
difference is the assistant's text. Concatenated, these pieces must equal the rendering of the whole conversation. A
template for which they do not (because it drops or changes earlier messages, or numbers its messages) is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hyperagent.data.chat.messages import Message
from hyperagent.data.chat.tokenizer import Conversation, Encoded
from hyperagent.errors import DataError


def assistant_spans(
    messages: Sequence[Message], conversation: Conversation, rendered: str, *, end: str
) -> list[tuple[int, int]]:
    """Return the spans of `rendered` that the assistant wrote, one per turn, each with its end-of-turn token.

    Each turn is rendered after the previous turn and the messages between them. If the template renders that context
    differently, the messages before the first turn are prepended. The time is linear in the number of messages;
    rendering every prefix would make it quadratic.

    Args:
        end: literal of the control token that ends a turn.

    Returns:
        (start, stop) character indices into `rendered`.

    Raises:
        DataError: the template is not prefix-preserving, or does not end a turn.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    head = range(turns[0])
    piece = _piece(conversation, [], head, turns[0], opening="")
    if piece is None or not rendered.startswith(piece.text):
        raise _not_prefix_preserving(turns[0])
    spans = [_span(piece, 0, turns[0], end)]
    cursor = len(piece.text)
    header_length = piece.written - len(conversation.render(head))
    for previous, index in pairwise(turns):
        between = range(previous + 1, index)
        alone = rendered[spans[-1][0] - header_length : cursor]
        piece = _piece(conversation, [previous], between, index, opening=alone)
        if piece is None or not rendered.startswith(piece.text, cursor):
            context = [*head, previous]
            piece = _piece(conversation, context, between, index, opening=conversation.render(context))
        if piece is None or not rendered.startswith(piece.text, cursor):
            raise _not_prefix_preserving(index)
        spans.append(_span(piece, cursor, index, end))
        cursor += len(piece.text)
    return spans


class _Piece(NamedTuple):
    """Text that a turn adds to a rendering."""

    text: str
    """Rendered messages since the previous turn, followed by the turn itself."""
    written: int
    """Index in `text` of the assistant's first character."""


def _piece(
    conversation: Conversation, context: Collection[int], between: Collection[int], index: int, *, opening: str
) -> _Piece | None:
    """Return the text that the messages `between` and the turn `index` add to the rendering of `context`.

    Args:
        opening: rendering of `context` alone.

    Returns:
        None if the template refuses the messages, or does not begin their rendering with `opening`.
    """
    with_tools = 0 in between or 0 in context
    try:
        before = conversation.render([*context, *between], add_generation_prompt=True, with_tools=with_tools)
        after = conversation.render([*context, *between, index], with_tools=with_tools)
    except DataError:
        return None
    if not (before.startswith(opening) and after.startswith(before)):
        return None
    return _Piece(after[len(opening) :], len(before) - len(opening))


def _span(piece: _Piece, cursor: int, index: int, end: str) -> tuple[int, int]:
    # Text that the template adds after the end-of-turn token (a newline in ChatML) is not the assistant's.
    ended = piece.text.rfind(end, piece.written)
    if ended < 0:
        raise DataError(f"the chat template does not end message {index} with {end}, so its end is never trained")
    return cursor + piece.written, cursor + ended + len(end)


def _not_prefix_preserving(index: int) -> DataError:
    return DataError(
        f"the chat template renders message {index} differently within a longer conversation; "
        "use a prefix-preserving template"
    )


def supervised_by_spans(encoded: Encoded, spans: Sequence[tuple[int, int]]) -> NDArray[np.uint32]:
    """Return the indices [N] of the tokens that lie entirely inside a span.

    Tokens that only straddle a span's border are excluded.
    """
    parts = [np.empty(0, dtype=np.int64)]
    for start, stop in spans:
        parts.append(np.arange(encoded.first_token_from(start), encoded.tokens_within(stop)))
    return np.concatenate(parts).astype(np.uint32)
