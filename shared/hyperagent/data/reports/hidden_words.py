"""Find the words of a dialogue that the assistant takes from parts that the student does not see."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hyperagent.data.chat.messages import Dialogue
from hyperagent.data.pipeline.views import ViewSettings, without
from hyperagent.data.reports.json_texts import json_texts

_WORD = re.compile(r"\w{3,}")


@dataclass(frozen=True)
class HiddenWords:
    """Words of one trajectory."""

    supervised: int
    """Number of words that the assistant wrote."""
    in_hidden: int
    """Number of these that the hidden parts contain."""
    unseen: Counter[str]
    """Of these, the words that the student's own view does not contain before them; each occurs once, and is visible
    from then on."""


def words_of(text: str) -> Iterator[str]:
    """Yield the words of a text in order: runs of at least three letters, digits and underscores with a letter, in
    lower case."""
    return (word for word in _WORD.findall(text.casefold()) if not word.isdecimal())


def all_words(dialogue: Dialogue) -> set[str]:
    """Return every word of a dialogue."""
    return {word for text in json_texts([dialogue.messages, dialogue.tools]) for word in words_of(text)}


def hidden_words(dialogue: Dialogue, views: ViewSettings, extra: str | None) -> HiddenWords:
    """Count the words that the assistant takes from what the teacher sees and the student does not."""
    hidden = {word for text in _hidden_texts(dialogue, views, extra) for word in words_of(text)}
    student = without(dialogue, views.internalized)
    visible = {word for text in json_texts(student.tools) for word in words_of(text)}
    supervised = in_hidden = 0
    unseen: Counter[str] = Counter()
    for message in student.messages:
        is_supervised = message["role"] == "assistant"
        for word in (word for text in _texts_of_message(message) for word in words_of(text)):
            if is_supervised:
                supervised += 1
                in_hidden += word in hidden
                unseen[word] += word in hidden and word not in visible
            visible.add(word)
    return HiddenWords(supervised, in_hidden, +unseen)


def _hidden_texts(dialogue: Dialogue, views: ViewSettings, extra: str | None) -> Iterator[str]:
    if "system" in views.internalized:
        yield dialogue.system or ""
    if "tools" in views.internalized:
        yield from json_texts(dialogue.tools)
    if "task" in views.internalized:
        yield dialogue.task
    if "extra" in views.condition and views.extra_in_teacher and extra:
        yield extra


def _texts_of_message(message: dict[str, Any]) -> Iterator[str]:
    """Yield what a template shows of a message: its content, then its calls."""
    yield message["content"]
    for call in message.get("tool_calls", []):
        yield from json_texts([call["function"]["name"], call["function"]["arguments"]])
