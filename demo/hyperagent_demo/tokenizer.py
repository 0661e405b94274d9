"""Train a tokenizer for the demo in Qwen's format: byte-level BPE, single digits, ChatML turns."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hyperagent.data.chat.messages import dialogue_of
from hyperagent.data.files.reader import read_rows_or_refusals
from hyperagent.errors import DataError, RowRefused
from hyperagent.storage.files import new_directory

_END_OF_TEXT, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CONTROL = re.compile("|".join(re.escape(token) for token in (_END_OF_TEXT, _TURN_START, _TURN_END)))
_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

# The splitter in the tokenizer.json of Qwen2.5 and Qwen3. Qwen also normalizes to NFC, which is left out here so that
# decoding restores the exact bytes.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int = 2048) -> None:
    """Train on `texts` and write a folder that `ChatTokenizer` and Transformers load.

    Args:
        vocab_size: number of entries, including control tokens and the 256 bytes; the vocabulary is smaller if the
            texts have no more pairs to merge.

    Raises:
        StorageError: a file system operation failed.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT, _TURN_START, _TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _TURN_END,
        "pad_token": _END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    with new_directory(folder) as temporary:
        tokenizer.save(str(temporary / "tokenizer.json"))
        (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(_TEMPLATE, temporary / _TEMPLATE.name)


def tokenizer_texts(path: Path) -> Iterator[str]:
    """Yield the text between the control tokens of every rendered trajectory of a Parquet file.

    Invalid rows are skipped; tokenization reports them later.

    Raises:
        DataError: the file is unusable.
    """
    # Rendering needs a tokenizer object, but not its vocabulary.
    renderer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    template = _TEMPLATE.read_text(encoding="utf-8")
    for row in read_rows_or_refusals(path):
        if isinstance(row, RowRefused):
            continue
        try:
            dialogue = dialogue_of(row)
        except DataError:
            continue
        rendered = renderer.apply_chat_template(
            dialogue.messages, tools=[*dialogue.tools] or None, chat_template=template, tokenize=False
        )
        yield from (part for part in _CONTROL.split(str(rendered)) if part)
