"""Learn how a chat template opens and ends the assistant's turns, and find those turns in token ids.

This is the second of two independent methods to find the assistant's text (the first is `mask_by_rendering`). They
share only the end-of-turn token: this one renders no part of the row, and reads ids instead of text and offsets. It can
trust control tokens, because `tokenizer` encodes a row's own text without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError, DataError

_QUESTION = {"role": "user", "content": "question"}
_ANSWER = {"role": "assistant", "content": "answer"}


@dataclass(frozen=True)
class TurnShape:
    """Tokens that a template writes around the assistant's text."""

    opening: tuple[tuple[int, str], ...]
    """Control token ids, each with the plain text after it: ((<|im_start|>, "assistant\\n"),) in ChatML."""
    end: str
    """Literal of the control token that ends the turn, "<|im_end|>" in ChatML."""
    end_id: int


def turn_shape(tokenizer: ChatTokenizer) -> TurnShape:
    """Learn the shape of a template's turns from a question and its answer.

    Whether longer conversations keep their earlier turns is decided row by row, in `mask_by_rendering`: templates that drop
    the reasoning of earlier turns are fine for rows without any.

    Raises:
        ConfigError: the template is not prefix-preserving, hides the assistant's text, opens or ends its turns
            without a control token, or refuses the conversation.
    """
    conversation = tokenizer.conversation([_QUESTION, _ANSWER], [])
    trouble = f"the chat template in {tokenizer.folder}"
    try:
        asked, header, answered = (
            conversation.render(range(1)),
            conversation.render(range(1), add_generation_prompt=True),
            conversation.render(range(2)),
        )
    except DataError as error:
        raise ConfigError(f"{trouble} refuses a plain conversation: {error}; use the model's own template") from error
    if not (header.startswith(asked) and answered.startswith(header)):
        raise ConfigError(
            f"{trouble} is not prefix-preserving: a longer conversation changes what it wrote for a shorter one; "
            "use a template that keeps earlier turns as they were"
        )
    answer = answered[len(header) :]
    if _ANSWER["content"] not in answer:
        raise ConfigError(f"{trouble} does not show the assistant's text; use the model's own template")
    control = tokenizer.control
    end = control.search(answer, answer.index(_ANSWER["content"]))
    if end is None:
        raise ConfigError(
            f"{trouble} ends the assistant's turn without a control token, so the student would never learn to stop; "
            "use a template that writes the end-of-turn token"
        )
    # If a template writes no header before a reply, the control token that ends the question opens the reply.
    marks = list(control.finditer(header, len(asked))) or list(control.finditer(header))[-1:]
    if not marks:
        raise ConfigError(f"{trouble} opens the assistant's turn without a control token; use the model's own template")
    bounds = [*(mark.start() for mark in marks[1:]), len(header)]
    pieces = [(tokenizer.control_ids[m.group()], header[m.end() : stop]) for m, stop in zip(marks, bounds, strict=True)]
    return TurnShape(tuple(pieces), end.group(), tokenizer.control_ids[end.group()])


class TurnScanner:
    """Finds the tokens of the assistant's turns in token ids."""

    def __init__(self, tokenizer: ChatTokenizer, shape: TurnShape) -> None:
        self._tokenizer = tokenizer
        self._shape = shape
        self._is_control = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_control[list(tokenizer.control_ids.values())] = True

    def supervised(self, ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return the positions [N] of the assistant's tokens in `ids` [T], end-of-turn tokens included."""
        controls = np.flatnonzero(self._is_control[ids])
        parts = [np.empty(0, dtype=np.int64)]
        for place in np.flatnonzero(ids[controls] == self._shape.opening[0][0]).tolist():
            start = self._after_opening(ids, controls, place)
            if start is None:
                continue
            later = controls[np.searchsorted(controls, start) :]
            ends = later[ids[later] == self._shape.end_id]
            openings = later[ids[later] == self._shape.opening[0][0]]
            # Without a reply header, the token that ends a question opens a turn only if a reply follows.
            if len(ends) and not (len(openings) and openings[0] < ends[0]):
                parts.append(np.arange(start, ends[0] + 1))
        return np.concatenate(parts).astype(np.uint32)

    def _after_opening(self, ids: NDArray[np.uint32], controls: NDArray[np.int64], place: int) -> int | None:
        """Return the index of the first token after the opening at control token number `place`.

        Returns:
            None if the tokens there do not open an assistant's turn.
        """
        last = len(self._shape.opening) - 1
        for number, (control_id, text) in enumerate(self._shape.opening):
            if place + number >= len(controls):
                return None
            index = int(controls[place + number])
            if ids[index] != control_id:
                return None
            if number == last:
                return self._after_text(ids, index + 1, text)
            following = int(controls[place + number + 1]) if place + number + 1 < len(controls) else len(ids)
            if self._tokenizer.decode(ids[index + 1 : following].tolist()) != text:
                return None
        return None

    def _after_text(self, ids: NDArray[np.uint32], start: int, text: str) -> int | None:
        """Return the index of the first token after `text`, or None if the tokens at `start` spell another text."""
        while text and start < len(ids):
            spelled = self._tokenizer.decode([int(ids[start])])
            if not (text.startswith(spelled) or spelled.startswith(text)):
                return None
            text = text[len(spelled) :]
            start += 1
        return None if text else start
