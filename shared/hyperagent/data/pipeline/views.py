"""Make the three views of a trajectory, as token ids.

The teacher sees the whole conversation, and the extra text if there is one. The hypernetwork reads the condition. The
student sees the whole conversation without the extra text, or also without the parts that the adapter should
internalize: conditioning can only help if the adapter knows something that the student does not see and that the
teacher's rows depend on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from hyperagent.config import StrictModel
from hyperagent.data.chat.mask_by_rendering import assistant_spans, supervised_by_spans
from hyperagent.data.chat.mask_by_scanning import TurnScanner, turn_shape
from hyperagent.data.chat.messages import Dialogue, canonical_tools
from hyperagent.data.chat.tokenizer import ChatTokenizer, Conversation
from hyperagent.data.files.tokens_file import TokenizedTrajectory
from hyperagent.errors import DataError, MaskDisagreement, TooLong

Part = Literal["system", "tools", "task", "extra"]
_ORDER: tuple[Part, ...] = ("system", "tools", "task", "extra")


class ViewSettings(StrictModel):
    """Contents and length limits of the three views."""

    condition: tuple[Part, ...] = ("system", "tools", "task")
    """Parts that the hypernetwork reads; must contain the task."""
    internalized: tuple[Part, ...] = ()
    """Parts that the student does not see; empty means the *full* view."""
    extra_in_teacher: Literal["system", "task"] | None = "system"
    """Where the teacher sees the extra text, if the condition contains it.

    "system": at the end of the system prompt, or before the task if there is no system prompt. "task": after the task.
    None: nowhere. The teacher's rows cannot depend on a text that it does not see. The student never sees the text."""
    max_tokens: int = Field(131_072, ge=2)
    """Maximum number of tokens in the teacher's view, the extra text included."""
    max_prompt_tokens: int = Field(32_768, ge=1)
    """Maximum number of tokens in the condition."""
    cut: bool = False
    """Cut a longer trajectory after the last assistant turn that fits, instead of refusing it."""

    @field_validator("condition", "internalized")
    @classmethod
    def _in_order(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(part for part in _ORDER if part in parts)

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if "task" not in self.condition:
            raise ValueError("the condition must contain the task; add it")
        if "extra" in self.internalized:
            raise ValueError("the extra text is never shown to the student, so it cannot be internalized; leave it out")
        if unknown := [part for part in self.internalized if part not in self.condition]:
            raise ValueError(
                f"{' and '.join(unknown)} cannot be both hidden from the student and missing in the condition, since "
                "the adapter could not know it; add it to the condition"
            )
        return self


@dataclass(frozen=True)
class Condition:
    """The texts from which a condition is built."""

    task: str
    system: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    """Declarations of the tools."""
    extra: str | None = None


@dataclass(frozen=True, eq=False)
class MaskedText:
    """A rendered, tokenized and masked conversation."""

    dialogue: Dialogue
    text: str
    """Rendering of the dialogue by the stock template."""
    ids: NDArray[np.uint32]
    """Token ids, shape [T]."""
    positions: NDArray[np.uint32]
    """Indices of the assistant's tokens, on which both masks agree, shape [N], strictly increasing, at least 1."""


class ViewMaker:
    """Makes the views of trajectories with one tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        """Learn the shape of the template's turns.

        Raises:
            ConfigError: the template cannot be used (see `mask_by_scanning.turn_shape`).
        """
        self.tokenizer = tokenizer
        self._shape = turn_shape(tokenizer)
        self._scanner = TurnScanner(tokenizer, self._shape)

    def __reduce__(self) -> tuple[type[Self], tuple[ChatTokenizer]]:
        return type(self), (self.tokenizer,)

    def make(
        self,
        trajectory_id: str,
        repo: str,
        split: str,
        dialogue: Dialogue,
        *,
        settings: ViewSettings,
        extra: str | None = None,
    ) -> TokenizedTrajectory:
        """Make the three views of a dialogue.

        Args:
            extra: the extra text; required if the condition contains it, not used otherwise.

        Raises:
            DataError: the dialogue cannot be used; the message states the reason.
        """
        prompt_ids = condition_ids(
            self.tokenizer,
            Condition(dialogue.task, dialogue.system, dialogue.tools, extra),
            parts=settings.condition,
        )
        if len(prompt_ids) > settings.max_prompt_tokens:
            raise DataError(
                f"its condition has {len(prompt_ids)} tokens, the limit for a condition is {settings.max_prompt_tokens}"
            )
        shown = dialogue
        if extra and "extra" in settings.condition:
            shown = with_extra(dialogue, extra, where=settings.extra_in_teacher)
        teacher = self.masked(shown, max_tokens=settings.max_tokens, cut=settings.cut)
        student = teacher
        if settings.internalized or shown is not dialogue:
            kept = dialogue.first(len(teacher.dialogue.messages))
            student = self.masked(without(kept, settings.internalized))
        trajectory = TokenizedTrajectory(
            trajectory_id,
            repo,
            split,
            token_ids=teacher.ids,
            positions=teacher.positions,
            prompt_ids=prompt_ids,
            student_ids=student.ids,
            student_positions=student.positions,
        )
        trajectory.require_aligned()
        return trajectory

    def masked(self, dialogue: Dialogue, *, max_tokens: int | None = None, cut: bool = False) -> MaskedText:
        """Render, tokenize and mask a dialogue.

        Raises:
            DataError: the template refuses the dialogue, nothing is supervised, or an end of a turn is not.
            TooLong: the dialogue has more than `max_tokens` tokens, and `cut` is False or no turn fits.
            MaskDisagreement: the two masks differ.
        """
        self.tokenizer.printed.require(dialogue.messages, dialogue.tools)
        conversation = self.tokenizer.conversation(dialogue.messages, dialogue.tools)
        rendered = conversation.render()
        encoded = conversation.encode(rendered)
        if max_tokens is not None and len(encoded.ids) > max_tokens:
            if not cut:
                raise TooLong(f"it has {len(encoded.ids)} tokens, the limit is {max_tokens}")
            fitting = _messages_that_fit(dialogue, conversation, encoded.character_behind(max_tokens - 1))
            dialogue = dialogue.first(fitting)
            rendered = conversation.render(range(fitting))
            encoded = conversation.encode(rendered)
        text = conversation.stock_text(rendered, range(len(dialogue.messages)))
        spans = assistant_spans(dialogue.messages, conversation, rendered, end=self._shape.end)
        positions = supervised_by_spans(encoded, spans)
        self._require_agreement(encoded.ids, positions)
        self._require_ends(encoded.ids, positions, num_turns=len(spans))
        return MaskedText(dialogue, text, encoded.ids, positions)

    def _require_agreement(self, ids: NDArray[np.uint32], positions: NDArray[np.uint32]) -> None:
        by_turns = self._scanner.supervised(ids)
        if np.array_equal(by_turns, positions):
            return
        first = int(np.setxor1d(by_turns, positions)[0])
        nearby = self.tokenizer.decode(ids[max(0, first - 4) : first + 4].tolist())
        raise MaskDisagreement(
            f"the two ways to find the assistant's tokens disagree first at token {first}, near {nearby!r}"
        )

    def _require_ends(self, ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, num_turns: int) -> None:
        """Require that every turn's end is supervised, and that the first token, which has no context, is not."""
        ends = int((ids[positions] == self._shape.end_id).sum())
        if ends != num_turns:
            raise DataError(f"{ends} ends of turns are supervised, but the assistant has {num_turns} turns")
        if positions[0] == 0:
            raise DataError("its first token is the assistant's, which has no context to be predicted from")


def condition_ids(tokenizer: ChatTokenizer, condition: Condition, *, parts: Iterable[str]) -> NDArray[np.uint32]:
    """Return the token ids [P] that the hypernetwork reads, in training and in use.

    The condition is rendered as a user turn, after a system turn with tools if `parts` contains them.

    Raises:
        DataError: `parts` contains the extra text but there is none, or a text cannot be rendered.
    """
    parts = set(parts)
    text = condition.task
    if "extra" in parts:
        if not condition.extra:
            raise DataError("it has no extra text, which the condition requires")
        text = f"{text}\n\n{condition.extra}"
    messages = [{"role": "user", "content": text}]
    if "system" in parts and condition.system is not None:
        messages.insert(0, {"role": "system", "content": condition.system})
    tools = canonical_tools(condition.tools) if "tools" in parts else []
    tokenizer.printed.require(messages, tools)
    conversation = tokenizer.conversation(messages, tools)
    rendered = conversation.render()
    conversation.stock_text(rendered, range(len(messages)))
    return conversation.encode(rendered).ids


def with_extra(dialogue: Dialogue, extra: str, *, where: Literal["system", "task"] | None) -> Dialogue:
    """Return a dialogue that shows the extra text (see `ViewSettings.extra_in_teacher`), with as many messages.

    Raises:
        DataError: the text belongs into the task's message, and there is none.
    """
    if where is None:
        return dialogue
    if where == "system" and dialogue.system is not None:
        place, content = 0, f"{dialogue.system}\n\n{extra}"
    elif where == "system":
        place, content = dialogue.task_index, f"{extra}\n\n{dialogue.task}"
    else:
        place, content = dialogue.task_index, f"{dialogue.task}\n\n{extra}"
    messages = list(dialogue.messages)
    messages[place] = {**messages[place], "content": content}
    return replace(dialogue, messages=messages)


def without(dialogue: Dialogue, parts: Iterable[str]) -> Dialogue:
    """Return a dialogue without some of its parts.

    The task's message keeps its place with empty text: many templates require a user turn before the assistant's, and
    chat servers require a user message.
    """
    parts = set(parts)
    messages = list(dialogue.messages)
    if "task" in parts:
        messages[dialogue.task_index] = {"role": "user", "content": ""}
    if "system" in parts and dialogue.system is not None:
        messages = messages[1:]
    return replace(dialogue, messages=messages, tools=[] if "tools" in parts else dialogue.tools)


def _messages_that_fit(dialogue: Dialogue, conversation: Conversation, num_characters: int) -> int:
    """Return how many messages fit within `num_characters` of rendered text, ending with an assistant message."""
    ends = [index + 1 for index, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
    # Renderings grow with the number of messages, so the cut is found by bisection.
    fitting = bisect_right(ends, num_characters, key=lambda count: len(conversation.render(range(count))))
    if fitting == 0:
        raise TooLong("its first assistant turn ends after the limit of tokens")
    return ends[fitting - 1]
