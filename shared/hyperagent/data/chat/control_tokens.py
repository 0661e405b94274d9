"""Prevent literals of control tokens in untrusted text from becoming control tokens.

A stock tokenizer turns a literal `<|im_end|>` in a tool's output into the control token, which ends a turn. Therefore
a marker is inserted into such literals before the template runs. It is removed again once the control tokens written
by the template have been located.

Partial literals that the template could complete are broken too: a text that ends with the beginning of a literal
(`<|im_end|` before a template's `>`) and a text that starts with the rest of one (`|im_end|>` after a template's `<`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hyperagent.errors import DataError

# JSON can encode a lone surrogate (RFC 8259, section 8.2), but no tokenizer accepts it.
_SURROGATE = re.compile("[\ud800-\udfff]")


_FORMAT_KEYS = frozenset(
    {
        "role", "content", "name", "id", "type", "function", "arguments", "tool_calls", "tool_call_id", "reasoning_content",
        "thinking", "description", "parameters", "properties", "required", "enum", "items",
    }
)  # fmt: skip
"""Keys of messages and tools that a template looks up; broken, it would not find them. `id` is a piece of `<|video_pad|>`."""


class Guard:
    """Breaks literals of a tokenizer's control tokens with a marker."""

    def __init__(self, literals: Iterable[str]) -> None:
        literals = list(literals)
        beginnings = {text[:length] for text in literals for length in range(1, len(text))}
        # A template may trim trailing white space, so a partial literal followed by white space is risky too.
        self._risky = re.compile(rf"{any_of(literals)}|(?:{any_of(beginnings)})(?=\s*\Z)")
        endings = {text[start:] for text in literals for start in range(1, len(text) - 1)}
        middles = {ending[:length] for ending in endings for length in range(2, len(ending))}
        self._risky_start = re.compile(rf"{any_of(endings)}|(?:{any_of(middles)})(?=\s*\Z)")
        # The expression has thousands of alternatives; comparing two characters first rules out nearly every text.
        self._first_two = {ending[:2] for ending in endings}

    def marker_for(self, value: Any) -> str | None:
        """Return a marker that occurs in no text of `value`, or None if no literal has to be broken.

        The marker is printable ASCII, so it survives a template that writes texts in Python's or JSON's notation.

        Raises:
            DataError: a text holds half of a surrogate pair.
        """
        is_risky = False
        for text in _texts(value):
            if not text.isascii() and _SURROGATE.search(text):
                raise DataError("a text holds half of a surrogate pair, which is no character; remove it")
            is_risky = is_risky or self._risky.search(text) is not None or self._starts_risky(text)
        if not is_risky:
            return None
        number = 100_000
        while any(str(number) in text for text in _texts(value)):
            number += 1
        return f"~{number}~"

    def broken(self, value: Any, marker: str) -> Any:
        """Return a copy of `value` with `marker` inserted in every text that could spell a control token."""
        if isinstance(value, str):
            text = self._risky.sub(lambda match: match.group()[0] + marker + match.group()[1:], value)
            start = _start(text)
            return text[: start + 1] + marker + text[start + 1 :] if self._starts_risky(text) else text
        if isinstance(value, Mapping):
            return {
                key if key in _FORMAT_KEYS else self.broken(key, marker): self.broken(item, marker)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.broken(item, marker) for item in value]
        return value

    def _starts_risky(self, text: str) -> bool:
        start = _start(text)
        return text[start : start + 2] in self._first_two and self._risky_start.match(text, start) is not None


def any_of(texts: Iterable[str]) -> str:
    """Return a regular expression that matches any of `texts`, preferring the longest."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


def _start(text: str) -> int:
    return len(text) - len(text.lstrip())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _FORMAT_KEYS:
                yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
