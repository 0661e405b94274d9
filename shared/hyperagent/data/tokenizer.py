"""A tokenizer folder as this project uses it: its ids, its chat template, its identity.

Untrusted text must not be able to open or close a turn, yet a stock tokenizer turns a literal
`<|im_end|>` in a tool's output into the control token. So the template is run over messages in which
such literals are broken by a marker, the rendered text is cut at the control tokens that the template
itself wrote, and what stands between them is encoded as plain text with the markers taken out again.
A text's last characters are broken too where the template could complete them: an argument named
`<|im_end|` followed by the template's `>` would end the turn. For text without such literals the ids
equal those of `apply_chat_template(tokenize=True)`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from hyperagent.errors import ConfigError, DataError
from hyperagent.identity import TokenizerIdentity, tokenizer_sha256

# A noncharacter of Unicode: never valid in interchanged text (Unicode 16, section 23.7), so never a row's own.
_MARKER = "\ufdd0"
# JSON can spell one (RFC 8259, section 8.2), and no tokenizer takes it.
_SURROGATE = re.compile("[\ud800-\udfff]")

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids and where each came from in the rendered text."""

    ids: NDArray[np.uint32]
    """[T]."""
    starts: NDArray[np.int64]
    """[T], index of each token's first character."""
    ends: NDArray[np.int64]
    """[T], index after each token's last character."""


class Conversation:
    """Messages and tools whose literals of control tokens are broken by a marker (see the module's text)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, messages: list[Any], tools: list[Any]) -> None:
        self._tokenizer = tokenizer
        self._messages = messages
        self._tools = tools

    def render(self, indices: Iterable[int] | None = None, *, add_generation_prompt: bool = False) -> str:
        """The template's text for the messages at `indices`, or for all.

        Raises:
            DataError: the template refuses the conversation.
        """
        messages = self._messages if indices is None else [self._messages[index] for index in indices]
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=self._tools or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # jinja runs the template's own code: anything may come out of it
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"the chat template refuses the conversation: {why}") from error
        return str(text)


class ChatTokenizer:
    """A tokenizer with its chat template, read from a folder."""

    def __init__(self, folder: Path) -> None:
        """Load `tokenizer.json` and the chat template.

        Raises:
            ConfigError: a file is missing or broken, or there is no chat template or no control token.
        """
        digest = tokenizer_sha256(folder)
        try:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the readers of both libraries fail with whatever a broken file makes of them
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"cannot load a tokenizer from {folder}: {why}; copy the model's own files") from error
        template = self._tokenizer.chat_template
        if not isinstance(template, str):
            raise ConfigError(
                f"the tokenizer in {folder} has no chat template; put chat_template.jinja beside tokenizer.json"
            )
        self.folder = folder
        self.identity = TokenizerIdentity(digest, hashlib.sha256(template.encode()).hexdigest())
        self.vocab_size = len(self._tokenizer)
        """Number of real entries, added tokens included."""
        # encode_special_tokens: control tokens' literals become plain text (tokenizers >= 0.19).
        self._plain = self._tokenizer.backend_tokenizer
        self._plain.encode_special_tokens = True
        added = self._plain.get_added_tokens_decoder()
        self._control_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        if not self._control_ids:
            raise ConfigError(f"the tokenizer in {folder} has no control token, so turns cannot be told from text")
        self._control = re.compile(_any_of(self._control_ids))
        beginnings = {text[:length] for text in self._control_ids for length in range(1, len(text))}
        # A template may trim what follows, so white space does not make a beginning harmless.
        self._to_break = re.compile(rf"{_any_of(self._control_ids)}|(?:{_any_of(beginnings)})(?=\s*\Z)")

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Conversation:
        """A conversation ready to be rendered, in whole or in part.

        Raises:
            DataError: a text holds the reserved noncharacter U+FDD0 or half of a surrogate pair.
        """
        return Conversation(
            self._tokenizer, _guard(list(messages), self._to_break), _guard(list(tools), self._to_break)
        )

    def encode(self, rendered: str) -> Encoded:
        """Token ids of a text from `Conversation.render`, with character offsets into that text."""
        controls = list(self._control.finditer(rendered))
        bounds = [0, *(bound for control in controls for bound in control.span()), len(rendered)]
        texts = [rendered[start:stop] for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]
        encodings = self._plain.encode_batch([text.replace(_MARKER, "") for text in texts], add_special_tokens=False)
        ids: list[int] = []
        spans = []
        for number, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            ids.extend(encoding.ids)
            spans.append(
                bounds[2 * number] + _with_markers(np.asarray(encoding.offsets, np.int64).reshape(-1, 2), text)
            )
            if number < len(controls):
                ids.append(self._control_ids[controls[number].group()])
                spans.append(np.asarray([controls[number].span()], np.int64))
        starts, ends = np.concatenate(spans).T
        return Encoded(np.asarray(ids, np.uint32), starts, ends)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def prompt_ids(self, prompt: str) -> NDArray[np.uint32]:
        """[P]: the condition view of a task's text, one user turn."""
        return self.encode(self.conversation([{"role": "user", "content": prompt}], []).render()).ids


def _guard(value: Any, to_break: re.Pattern[str]) -> Any:
    """Break what `to_break` matches in `value`'s strings after its first character."""
    if isinstance(value, str):
        if _MARKER in value:
            raise DataError("a text holds the noncharacter U+FDD0, which is reserved here; remove it")
        if not value.isascii() and _SURROGATE.search(value):
            raise DataError("a text holds half of a surrogate pair, which is no character; remove it")
        return to_break.sub(lambda match: match.group()[0] + _MARKER + match.group()[1:], value)
    if isinstance(value, Mapping):
        return {_guard(key, to_break): _guard(item, to_break) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guard(item, to_break) for item in value]
    return value


def _with_markers(offsets: NDArray[np.int64], text: str) -> NDArray[np.int64]:
    """Character offsets into `text` for those into `text` without its markers."""
    marks = [match.start() - number for number, match in enumerate(re.finditer(_MARKER, text))]
    return offsets + np.searchsorted(marks, offsets, side="right")


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression for any of `texts`, the longest that fits."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
