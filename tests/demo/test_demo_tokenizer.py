from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from hyperagent.data.chat.messages import dialogue_of
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.reader import read_rows
from hyperagent.data.files.tokens_file import read_tokens
from hyperagent.data.pipeline.tokenize_dataset import TokenizeSettings, tokenize_file
from hyperagent.data.pipeline.views import ViewMaker
from hyperagent_demo.tokenizer import tokenizer_texts, train_tokenizer


@pytest.fixture(scope="module")
def folder(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(tokenizer_texts(sample_path), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer(folder)


def test_training_twice_gives_the_same_files(sample_path: Path, folder: Path, tmp_path: Path) -> None:
    train_tokenizer(tokenizer_texts(sample_path), tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_vocabulary_has_the_size_asked_for(sample_path: Path, tmp_path: Path) -> None:
    train_tokenizer(tokenizer_texts(sample_path), tmp_path / "small", vocab_size=600)
    assert ChatTokenizer(tmp_path / "small").vocab_size == 600


def test_transformers_loads_the_folder(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


def test_every_row_is_accepted_and_decodes_to_its_text(sample_path: Path, tokenizer: ChatTokenizer) -> None:
    lengths = []
    maker = ViewMaker(tokenizer)
    for row in read_rows(sample_path):
        masked = maker.masked(dialogue_of(row))
        assert tokenizer.decode(masked.ids.tolist()) == masked.text
        lengths.append(len(masked.ids))
    assert 700 <= statistics.median(lengths) <= 1200


def test_what_is_supervised_is_what_the_assistant_wrote(sample_path: Path, tokenizer: ChatTokenizer) -> None:
    maker = ViewMaker(tokenizer)
    for row in read_rows(sample_path):
        spoken_to = dialogue_of(row)
        masked = maker.masked(spoken_to)
        # Turns are separated by gaps in the positions.
        turns = np.split(masked.positions, np.flatnonzero(np.diff(masked.positions) > 1) + 1)
        texts = [tokenizer.decode(masked.ids[turn].tolist()) for turn in turns]
        spoken = [message for message in spoken_to.messages if message["role"] == "assistant"]
        assert len(texts) == len(spoken)
        for text, message in zip(texts, spoken, strict=True):
            assert text.startswith(message["content"])
            assert f"<function={message['tool_calls'][0]['function']['name']}>" in text
            assert text.endswith("</tool_call><|im_end|>")


@pytest.mark.parametrize(
    "text", ["naïve café\r\n\ttabs", "日本語 и кириллица", "👩‍🔬 1234567890", "e\u0301 not normalized", " \n\n  x  \n"]
)
def test_any_text_survives_encoding(tokenizer: ChatTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids.tolist()) == text


def test_digits_are_encoded_one_by_one(tokenizer: ChatTokenizer) -> None:
    assert len(tokenizer.encode("2048").ids) == 4


def test_no_text_holds_a_control_token(sample_path: Path, folder: Path) -> None:
    texts = list(tokenizer_texts(sample_path))
    assert not [text for text in texts if "<|" in text]
    merged = [token for token in json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"] if "<|" in token]
    assert sorted(merged) == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]


def test_whole_repositories_are_held_out(sample_path: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    report = tokenize_file(sample_path, tmp_path / "tokens.parquet", tokenizer, TokenizeSettings())
    assert report.refused == ()
    assert (report.rows, sum(report.splits.values())) == (72, 72)
    train, held_out = (
        {trajectory.repo for trajectory in read_tokens(tmp_path / "tokens.parquet", split=split)}
        for split in ("train", "held_out")
    )
    assert train.isdisjoint(held_out)
    assert (len(train), len(held_out)) == (19, 5)
