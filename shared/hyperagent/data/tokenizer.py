"""A tokenizer folder as this project uses it: its ids, its chat template, its identity.

Untrusted text must not be able to open or close a turn, yet a stock tokenizer turns a literal
`<|im_end|>` in a tool's output into the control token. So the template is run over messages in which
such literals are broken by a marker, the rendered text is cut at the control tokens that the template
itself wrote, and what stands between them is encoded as plain text with the markers taken out again.
For text without such literals the ids equal those of `apply_chat_template(tokenize=True)`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
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
    """Messages and tools whose literals of control tokens are broken by a marker; see the module."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, messages: list[Any], tools: list[Any]) -> None:
        self._tokenizer = tokenizer
        self._messages = messages
        self._tools = tools

    def render(self, num_messages: int | None = None, *, add_generation_prompt: bool = False) -> str:
        """The template's text for the first `num_messages` messages, or for all.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                self._messages[:num_messages],
                tools=self._tools or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # jinja runs the template's own code: anything may come out of it
            raise DataError(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error
        return str(text)


class ChatTokenizer:
    """A tokenizer with its chat template, read from a folder."""

    def __init__(self, folder: Path) -> None:
        """Load `tokenizer.json` and the chat template.

        Raises:
            ConfigError: a file is missing or broken, or there is no chat template.
        """
        digest = tokenizer_sha256(folder)
        try:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load a tokenizer from {folder}: {error}") from error
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
        self._control = re.compile(
            "|".join(re.escape(text) for text in sorted(self._control_ids, key=len, reverse=True))
        )

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Conversation:
        """A conversation ready to be rendered, in whole or up to any message.

        Raises:
            DataError: a text holds the reserved noncharacter U+FDD0.
        """
        return Conversation(self._tokenizer, _guard(list(messages), self._control), _guard(list(tools), self._control))

    def encode(self, rendered: str) -> Encoded:
        """Token ids of a text from `Conversation.render`, with character offsets into that text."""
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        cursor = 0
        for match in [*self._control.finditer(rendered), None]:
            stop = match.start() if match else len(rendered)
            if stop > cursor:
                self._encode_plain(rendered[cursor:stop], cursor, ids, starts, ends)
            if match:
                ids.append(self._control_ids[match.group()])
                starts.append(match.start())
                ends.append(match.end())
                cursor = match.end()
        return Encoded(np.asarray(ids, np.uint32), np.asarray(starts, np.int64), np.asarray(ends, np.int64))

    def _encode_plain(self, text: str, origin: int, ids: list[int], starts: list[int], ends: list[int]) -> None:
        clean = text.replace(_MARKER, "")
        encoding = self._plain.encode(clean, add_special_tokens=False)
        ids.extend(encoding.ids)
        if len(clean) == len(text):
            starts.extend(origin + start for start, _ in encoding.offsets)
            ends.extend(origin + end for _, end in encoding.offsets)
        else:
            where = [i for i, character in enumerate(text) if character != _MARKER] + [len(text)]
            starts.extend(origin + where[start] for start, _ in encoding.offsets)
            ends.extend(origin + where[end] for _, end in encoding.offsets)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def prompt_ids(self, prompt: str) -> NDArray[np.uint32]:
        """[P]: the condition view of a task's text, one user turn."""
        return self.encode(self.conversation([{"role": "user", "content": prompt}], []).render()).ids


def _guard(value: Any, control: re.Pattern[str]) -> Any:
    """Break every literal of a control token in `value`'s strings after its first character."""
    if isinstance(value, str):
        if _MARKER in value:
            raise DataError("a text holds the noncharacter U+FDD0, which is reserved here; remove it")
        return control.sub(lambda match: match.group()[0] + _MARKER + match.group()[1:], value)
    if isinstance(value, Mapping):
        return {_guard(key, control): _guard(item, control) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guard(item, control) for item in value]
    return value
