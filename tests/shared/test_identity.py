"""Tests that fingerprints cover everything that determines the numbers, and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
from cache_rows import IDENTITY
from transformers import AutoTokenizer

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError, DataError, IdentityMismatch
from hyperagent.identity import (
    DataIdentity,
    TokenizerIdentity,
    canonical_json,
    file_fingerprint,
    require_same,
    tokenizer_sha256,
    weights_fingerprint,
)
from hyperagent.model.bundle import copy_tokenizer


def test_every_field_but_the_name_changes_the_fingerprint() -> None:
    for field in fields(IDENTITY):
        value = getattr(IDENTITY, field.name)
        other = {int: 1, str: "x", tuple: (3.0,)}[type(value)]
        changed = replace(IDENTITY, **{field.name: value + other})
        assert (changed.fingerprint == IDENTITY.fingerprint) == (field.name == "model"), field.name


def test_a_mismatch_shows_the_fields_that_differ() -> None:
    require_same("x", expected=IDENTITY, found=IDENTITY, remedy="y")
    with pytest.raises(IdentityMismatch) as mismatch:
        require_same("the teacher", expected=IDENTITY, found=replace(IDENTITY, top_k=9), remedy="use another")
    assert str(mismatch.value) == "the teacher does not match: expected top_k=8, found top_k=9; use another"


def test_a_tokenizer_is_what_it_does_to_text() -> None:
    content = {"model": {"vocab": {"a": 0}}, "truncation": None}
    changes: list[dict[str, object]] = [
        {}, {"truncation": {"max_length": 5}}, {"version": "2.0"}, {"normalizer": None}, {"model": {"vocab": {"a": 0}, "new": False}},
        {"model": {"vocab": {"b": 0}}},
    ]  # fmt: skip
    digests = [tokenizer_sha256(json.dumps({**content, **change}, indent=n)) for n, change in enumerate(changes)]
    assert len(set(digests[:-1])) == 1
    assert digests[-1] != digests[0]


def test_a_tokenizer_is_the_same_however_its_files_are_written(tokenizer_folder: Path, tmp_path: Path) -> None:
    identity = ChatTokenizer(tokenizer_folder).identity
    # Saved again by Transformers, with merges in the other notation, with other line ends, and with the template elsewhere.
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "saved")
    pairs = copied(tokenizer_folder, tmp_path / "pairs")
    content = json.loads((pairs / "tokenizer.json").read_text())
    content["model"]["merges"] = [
        " ".join(merge) if isinstance(merge, list) else merge.split(" ") for merge in content["model"]["merges"]
    ]
    (pairs / "tokenizer.json").write_text(json.dumps(content, indent=3))
    lines = copied(tokenizer_folder, tmp_path / "lines")
    template = (lines / "chat_template.jinja").read_text()
    (lines / "chat_template.jinja").write_bytes(template.replace("\n", "\r\n").encode())
    embedded = copied(tokenizer_folder, tmp_path / "embedded")
    (embedded / "chat_template.jinja").unlink()
    config = json.loads((embedded / "tokenizer_config.json").read_text())
    (embedded / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    for folder in (tmp_path / "saved", pairs, lines, embedded):
        assert ChatTokenizer(folder).identity == identity, folder.name


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_added_tokens_outside_tokenizer_json_are_part_of_the_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = copied(tokenizer_folder, tmp_path / "added")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    before = ChatTokenizer(folder).identity
    added = {
        "content": "<extra>",
        "special": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    number = str(len(AutoTokenizer.from_pretrained(folder)))
    config["added_tokens_decoder"] = {**config.get("added_tokens_decoder", {}), number: added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    changed = ChatTokenizer(folder)
    assert changed.identity != before
    # A copy, such as the one in a bundle, is the same tokenizer.
    copy_tokenizer(folder, tmp_path / "copy")
    assert ChatTokenizer(tmp_path / "copy").identity == changed.identity


@pytest.mark.parametrize("part", ["added_tokens", "model", "normalizer", "pre_tokenizer", "post_processor", "decoder"])
def test_every_part_of_a_tokenizer_changes_its_digest(tokenizer_folder: Path, tmp_path: Path, part: str) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    before = tokenizer_sha256((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    if part == "added_tokens":
        content[part][-1]["content"] += "x"
    else:
        content[part] = {"type": "another"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert tokenizer_sha256((tmp_path / "tokenizer.json").read_text(encoding="utf-8")) != before


def test_an_added_token_changes_the_digest_of_a_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<|added|>"])
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_sha256((tmp_path / "tokenizer.json").read_text(encoding="utf-8")) != tokenizer_sha256(
        (tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8")
    )


def test_the_number_form_of_a_fingerprint_is_the_documented_one() -> None:
    numbers = {"temperatures": (0.5, 2.0, 1e-05), "top_k": 8, "text": 'ü"'}
    assert canonical_json(numbers) == '{"temperatures":[0.5,2.0,1e-05],"text":"ü\\"","top_k":8}'.encode()


def test_weights_are_their_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a model folder"):
        weights_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = weights_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{ "a":1 }')
    assert weights_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert weights_fingerprint(tmp_path) != first
    (tmp_path / "model.safetensors").write_bytes(b"one")
    (tmp_path / "notes.txt").write_text("x")
    assert weights_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert weights_fingerprint(tmp_path) != first
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        weights_fingerprint(tmp_path)


def test_data_are_their_tokenizer_source_and_settings() -> None:
    identity = DataIdentity(TokenizerIdentity("1", "2"), "3", {"views": {"cut": True}, "seed": 0})
    assert DataIdentity.from_json(identity.to_json()) == identity
    reordered = DataIdentity(TokenizerIdentity("1", "2"), "3", {"seed": 0, "views": {"cut": True}})
    assert reordered.fingerprint == identity.fingerprint
    others = [
        replace(identity, tokenizer=TokenizerIdentity("1", "x")),
        replace(identity, source="x"),
        replace(identity, settings={"views": {"cut": False}, "seed": 0}),
    ]
    assert len({identity.fingerprint, *(other.fingerprint for other in others)}) == 4
    for broken in (b"[]", b"{", b'{"tokenizer": {}, "source": "", "settings": {}}'):
        with pytest.raises((KeyError, TypeError, ValueError)):
            DataIdentity.from_json(broken)


def test_a_file_is_its_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"the same")
    assert file_fingerprint(tmp_path / "a") == file_fingerprint(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"the sane")
    assert file_fingerprint(tmp_path / "a") != file_fingerprint(tmp_path / "b")
    with pytest.raises(DataError, match="there is no file"):
        file_fingerprint(tmp_path / "c")


def test_tokenizers_that_differ_in_one_part_have_different_digests(tmp_path: Path) -> None:
    """Of the added tokens each field decides ids or how text around them is split."""
    token = {"id": 1, "content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    whole = {
        "version": "1.0",
        "added_tokens": [token],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 2}, "merges": [["a", "b"]], "byte_fallback": False},
    }
    others = [
        {**whole, "added_tokens": []},
        {**whole, "added_tokens": [token, {**token, "id": 3, "content": "<|im_start|>"}]},
        *({**whole, "added_tokens": [{**token, key: not token[key]}]} for key in ("special", "lstrip", "normalized")),
        {**whole, "added_tokens": [{**token, "id": 7}]},
        {**whole, "added_tokens": [{**token, "content": "<|im_stop|>"}]},
        {**whole, "normalizer": None},
        {**whole, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {**whole, "post_processor": {"type": "ByteLevel"}},
        {**whole, "model": {**whole["model"], "merges": []}},
        {**whole, "model": {**whole["model"], "byte_fallback": True}},
    ]
    digests = []
    for content in (whole, *others):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        digests.append(tokenizer_sha256((tmp_path / "tokenizer.json").read_text(encoding="utf-8")))
    assert len(set(digests)) == len(digests)
