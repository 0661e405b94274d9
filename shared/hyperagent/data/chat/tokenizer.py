"""Load a tokenizer folder; render conversations with its chat template and encode them.

Untrusted text must not be able to open or close a turn (see `control_tokens`). Therefore the rendered text is split at
the control tokens that the template itself wrote, and the text between them is encoded as plain text. For text without
literals of control tokens the ids equal those of `apply_chat_template(tokenize=True)`.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from hyperagent.data.chat.control_tokens import Guard, any_of
from hyperagent.data.chat.printed import PrintedContent
from hyperagent.errors import ConfigError, DataError
from hyperagent.identity import TokenizerIdentity, canonical_json, tokenizer_sha256

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class Encoded:
    """Token ids of a rendered text, with their character offsets."""

    def __init__(self, pieces: list[_Piece], firsts: list[int]) -> None:
        """Concatenate encoded pieces; called by `Conversation.encode`.

        Args:
            firsts: index of each piece's first character in the text.
        """
        self.ids: NDArray[np.uint32] = np.concatenate([piece.ids for piece in pieces])
        """Token ids, shape [T]."""
        self._pieces = pieces
        self._firsts = np.asarray(firsts)
        self._tokens_before = np.cumsum([0, *(len(piece.ids) for piece in pieces)])

    def first_token_from(self, character: int) -> int:
        """Return the index of the first token that starts at or after `character`."""
        place, inside = self._locate(character)
        starts = self._pieces[place].offsets()[:, 0]
        return int(self._tokens_before[place] + np.searchsorted(starts, inside, side="left"))

    def tokens_within(self, character: int) -> int:
        """Return the number of leading tokens that end at or before `character`."""
        place, inside = self._locate(character)
        ends = self._pieces[place].offsets()[:, 1]
        return int(self._tokens_before[place] + np.searchsorted(ends, inside, side="right"))

    def character_behind(self, token: int) -> int:
        """Return the index of the first character after a token."""
        place = int(np.searchsorted(self._tokens_before, token, side="right")) - 1
        return int(self._firsts[place] + self._pieces[place].offsets()[token - self._tokens_before[place], 1])

    def _locate(self, character: int) -> tuple[int, int]:
        """Return the index of the piece that contains `character` or ends at it, and the offset within that piece."""
        place = int(np.searchsorted(self._firsts, character, side="right")) - 1
        return place, character - int(self._firsts[place])


class _Piece:
    """Encoding of a control token, or of a text without control tokens."""

    def __init__(self, ids: NDArray[np.uint32], offsets: Callable[[], NDArray[np.int64]]) -> None:
        self.ids = ids
        """Token ids, shape [T]."""
        # Computed on demand: few pieces need offsets, and converting the library's lists takes as long as tokenizing.
        self._make_offsets = offsets
        self._offsets: NDArray[np.int64] | None = None

    def offsets(self) -> NDArray[np.int64]:
        """Return the tokens' (start, stop) character offsets within the piece, shape [T, 2]."""
        if self._offsets is None:
            self._offsets = self._make_offsets()
        return self._offsets


_DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""Date that templates print as today's, so that the same conversation has the same ids on every day. It is the date that
Llama's templates print themselves where they are given none."""

_DATE_CODES = (
    "%A",
    "%a",
    "%B",
    "%b",
    "%d",
    "%e",
    "%H",
    "%I",
    "%j",
    "%M",
    "%m",
    "%p",
    "%S",
    "%Y",
    "%y",
    "%F",
    "%T",
    "%-d",
    "%-m",
    "%-H",
    "%-I",
    "%-M",
    "%-S",
    "%-j",
    "%-y",
)
"""Codes of strftime that are replaced by the date's; any other is printed as it stands, which is the same every day too."""

_RANDOM = re.compile(r"\|\s*random\b|['\"]random['\"]|\blipsum\b")
"""What draws at random in a template: https://jinja.palletsprojects.com/en/stable/templates/#jinja-filters.random."""

_BESIDE_CONTROL = (
    "CONTROL", "CONTROLword", "CONTROL word", "CONTROL\nword", "wordCONTROL", "word CONTROL", "word\nCONTROL\n word",
    "CONTROLCONTROL", "CONTROL CONTROL", " CONTROL ", "\n\nCONTROL\n\n", "wordCONTROL  Word\tCONTROL1\u00e9 \u212b",
)  # fmt: skip
"""Texts around a control token that show whether a tokenizer treats their ends in a special way."""

_MarkedText = tuple[str, str]
"""A text without control tokens, and the marker it contains, "" if it contains none."""


class _PieceCache:
    """LRU cache of encoded pieces.

    The trajectories of a data set, and the views of one trajectory, share texts such as the system prompt.
    """

    _MAX_CHARACTERS = 1 << 20

    def __init__(self) -> None:
        self._pieces: OrderedDict[_MarkedText, _Piece] = OrderedDict()
        self._num_characters = 0

    def __contains__(self, text: _MarkedText) -> bool:
        return text in self._pieces

    def __getitem__(self, text: _MarkedText) -> _Piece:
        self._pieces.move_to_end(text)
        return self._pieces[text]

    def add(self, text: _MarkedText, piece: _Piece) -> None:
        self._pieces[text] = piece
        self._num_characters += len(text[0])
        while self._num_characters > self._MAX_CHARACTERS:
            self._num_characters -= len(self._pieces.popitem(last=False)[0][0])


class Conversation:
    """Messages and tools, ready to be rendered by a tokenizer's chat template and encoded."""

    def __init__(self, tokenizer: ChatTokenizer, messages: list[Message], tools: list[Tool]) -> None:
        """Break the literals of control tokens; called by `ChatTokenizer.conversation`."""
        self._tokenizer = tokenizer
        self._untouched = (messages, tools)
        self._marker = tokenizer.guard.marker_for([messages, tools])
        self._guarded = self._untouched
        if self._marker is not None:
            self._guarded = tokenizer.guard.broken(messages, self._marker), tokenizer.guard.broken(tools, self._marker)

    def render(
        self, indices: Iterable[int] | None = None, *, add_generation_prompt: bool = False, with_tools: bool = True
    ) -> str:
        """Render the messages at `indices`, or all, with the chat template; markers remain (see `control_tokens`).
        Raises:
            DataError: the template refuses the conversation.
        """
        messages, tools = self._guarded
        chosen = messages if indices is None else [messages[index] for index in indices]
        return self._tokenizer.apply_template(
            chosen, tools if with_tools else [], add_generation_prompt=add_generation_prompt
        )

    def stock_text(self, rendered: str, indices: Iterable[int]) -> str:
        """Remove the markers from a text of `render`, and check it against the rendering of the original messages.

        Args:
            indices: the messages that were rendered.

        Raises:
            DataError: the texts differ, because the template treats literals of control tokens specially.
        """
        if self._marker is None:
            return rendered
        messages, tools = self._untouched
        stock = self._tokenizer.apply_template(
            [messages[index] for index in indices], tools, add_generation_prompt=False
        )
        if self.plain(rendered) != stock:
            raise DataError(
                "the chat template treats a literal of a control token in its texts specially, so it cannot be kept "
                "as text; remove the literal"
            )
        return stock

    def plain(self, rendered: str) -> str:
        """Return a text of `render` without its markers."""
        return rendered if self._marker is None else rendered.replace(self._marker, "")

    def encode(self, rendered: str) -> Encoded:
        """Encode a text of `render`; character offsets refer to that text, markers included."""
        return self._tokenizer.encode(rendered, marker=self._marker)


class ChatTokenizer:
    """A tokenizer with its chat template, read from a folder."""

    def __init__(self, folder: Path) -> None:
        """Load `tokenizer.json` and the chat template.

        Raises:
            ConfigError: a file is missing or broken, or there is no chat template or no control token.
        """
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(f"there is no {folder / 'tokenizer.json'}; give a folder that holds tokenizer.json")
        try:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # both libraries raise arbitrary exceptions for a broken file
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"cannot load a tokenizer from {folder}: {why}; copy the model's own files") from error
        template = self._tokenizer.chat_template
        if not template:
            raise ConfigError(
                f"the tokenizer in {folder} has no chat template; put chat_template.jinja next to tokenizer.json"
            )
        # Several named templates: Transformers renders with `tool_use` where there are tools, else with `default`.
        text = template if isinstance(template, str) else canonical_json(template).decode()
        _require_repeatable(text, folder)
        self._tokenizer.chat_template = (
            _with_pinned_date(template)
            if isinstance(template, str)
            else {name: _with_pinned_date(one) for name, one in template.items()}
        )
        self.folder = folder
        # Jinja reads all kinds of line ends as one.
        template_digest = hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()
        digest = tokenizer_sha256(self._tokenizer.backend_tokenizer.to_str())
        self.identity = TokenizerIdentity(digest, template_digest)
        self.vocab_size = len(self._tokenizer)
        """Number of entries in the vocabulary, added tokens included."""
        # encode_special_tokens: control tokens' literals become plain text (tokenizers >= 0.19).
        self._plain = self._tokenizer.backend_tokenizer
        self._plain.encode_special_tokens = True
        added = self._plain.get_added_tokens_decoder()
        self.control_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        """Ids of the control tokens by literal; only a template can write them, never a row's text."""
        if not self.control_ids:
            raise ConfigError(
                f"the tokenizer in {folder} has no control token, so turns cannot be distinguished from text; copy the "
                "model's own files"
            )
        self.control = re.compile(any_of(self.control_ids))
        """Pattern that matches the literals of the control tokens."""
        self.guard = Guard(self.control_ids)
        self._pieces = _PieceCache()
        self._require_stock_ids()
        self.printed = PrintedContent(partial(self.apply_template, add_generation_prompt=False))
        """Knows which kinds of content the template loses."""

    def __reduce__(self) -> tuple[type[ChatTokenizer], tuple[Path]]:
        # Pickled as its folder: a worker process loads the tokenizer again.
        return type(self), (self.folder,)

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Conversation:
        """Prepare a conversation to be rendered, in whole or in part.
        Raises:
            DataError: a text holds half of a surrogate pair.
        """
        return Conversation(self, list(messages), list(tools))

    def apply_template(self, messages: Sequence[Message], tools: Sequence[Tool], *, add_generation_prompt: bool) -> str:
        """Render messages with the stock template.
        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # jinja runs the template's own code, which may raise anything
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"the chat template refuses the conversation: {why}") from error
        return str(text)

    def encode(self, rendered: str, *, marker: str | None = None) -> Encoded:
        """Encode a text in which every unbroken literal of a control token is that control token.

        Args:
            marker: text that breaks the other literals; it is not encoded, but the offsets count its characters.
        """
        controls = list(self.control.finditer(rendered))
        bounds = [0, *(bound for control in controls for bound in control.span()), len(rendered)]
        texts = [rendered[start:stop] for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]
        plain = self._encode_pieces([(text, marker if marker and marker in text else "") for text in texts])
        # Plain pieces and control tokens alternate, starting with a plain piece.
        pieces = [piece for pair in zip_longest(plain, map(self._control_piece, controls)) for piece in pair if piece]
        return Encoded(pieces, bounds[:-1])

    def _control_piece(self, control: re.Match[str]) -> _Piece:
        ids = np.asarray([self.control_ids[control.group()]], np.uint32)
        return _Piece(ids, lambda: np.asarray([[0, len(control.group())]]))

    def _encode_pieces(self, texts: list[_MarkedText]) -> list[_Piece]:
        new = list(dict.fromkeys(text for text in texts if text not in self._pieces))
        plain = [text.replace(marker, "") if marker else text for text, marker in new]
        encodings = self._plain.encode_batch(plain, add_special_tokens=False)
        encoded = {
            key: _Piece(np.asarray(encoding.ids, np.uint32), partial(_offsets, encoding, *key))
            for key, encoding in zip(new, encodings, strict=True)
        }
        # Adding pieces may evict others from the cache, so look up the known ones first.
        pieces = [encoded[text] if text in encoded else self._pieces[text] for text in texts]
        for key, piece in encoded.items():
            self._pieces.add(key, piece)
        return pieces

    def _require_stock_ids(self) -> None:
        """Require that encoding in pieces gives the ids of the stock tokenizer around every control token.

        Raises:
            ConfigError: it does not, because a text's ids depend on the control token beside it.
        """
        for control in self.control_ids:
            for pattern in _BESIDE_CONTROL:
                text = pattern.replace("CONTROL", control)
                found = self.encode(text).ids.tolist()
                self._plain.encode_special_tokens = False
                try:
                    stock = self._plain.encode(text, add_special_tokens=False).ids
                finally:
                    self._plain.encode_special_tokens = True
                if found != stock:
                    raise ConfigError(
                        f"the tokenizer in {self.folder} encodes {text!r} as {stock}, but as {found} if its text and "
                        "control tokens are encoded apart, which keeps texts from forging control tokens; a tokenizer that "
                        "adds a prefix space, strips or normalizes text beside control tokens cannot be used"
                    )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, control tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _with_pinned_date(template: str) -> str:
    """Return a template whose `strftime_now`, a function that Transformers offers, always returns the same date."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('{code}', '{_DATE.strftime(code)}')" for code in _DATE_CODES)
    # A macro hides the function of the same name; `+` keeps a newline at the template's start.
    return f"{{%- macro strftime_now(form) -%}}{{{{ form{replaced} }}}}{{%- endmacro +%}}{template}"


def _require_repeatable(template: str, folder: Path) -> None:
    if (found := _RANDOM.search(template)) is not None:
        raise ConfigError(
            f"the chat template in {folder} draws at random ({found.group()!r}), so the same conversation would have "
            "other ids each time; use a template without it"
        )


def _offsets(encoding: Encoding, text: str, marker: str) -> NDArray[np.int64]:
    """Return character offsets [T, 2] into `text`, given its encoding without the markers."""
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    if not marker:
        return offsets
    marks = [match.start() - number * len(marker) for number, match in enumerate(re.finditer(re.escape(marker), text))]
    return offsets + len(marker) * np.searchsorted(marks, offsets, side="right")
