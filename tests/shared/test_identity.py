"""Fingerprints cover what decides the numbers and nothing else; tokens and configuration are strict."""

from __future__ import annotations

import json
import stat
from dataclasses import fields, replace
from pathlib import Path

import pytest
from cache_rows import IDENTITY
from pydantic import Field

from hyperagent.auth import ensure_token, is_authorised, read_token
from hyperagent.config import StrictModel, load_yaml
from hyperagent.errors import ConfigError, IdentityMismatch
from hyperagent.identity import require_same, tokenizer_sha256, weights_fingerprint


def test_every_field_but_the_name_changes_the_fingerprint() -> None:
    for field in fields(IDENTITY):
        value = getattr(IDENTITY, field.name)
        changed = replace(IDENTITY, **{field.name: value + 1 if isinstance(value, int) else value + "x"})
        assert (changed.fingerprint == IDENTITY.fingerprint) == (field.name == "model"), field.name


def test_a_mismatch_shows_the_fields_that_differ() -> None:
    require_same("x", expected=IDENTITY, found=IDENTITY, remedy="y")
    with pytest.raises(IdentityMismatch) as mismatch:
        require_same("the teacher", expected=IDENTITY, found=replace(IDENTITY, top_k=9), remedy="use another")
    assert str(mismatch.value) == "the teacher does not match: expected top_k=8, found top_k=9; use another"


def test_a_tokenizer_is_what_it_does_to_text(tmp_path: Path) -> None:
    content = {"model": {"vocab": {"a": 0}}, "truncation": None}
    digests = []
    for change in ({}, {"truncation": {"max_length": 5}}, {"model": {"vocab": {"b": 0}}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}, indent=len(digests)))
        digests.append(tokenizer_sha256(tmp_path))
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(ConfigError, match=r"give a folder that holds tokenizer\.json"):
        tokenizer_sha256(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"give a folder that holds tokenizer\.json"):
        tokenizer_sha256(tmp_path)


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


def test_the_token_is_made_once_and_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "home" / "token"
    monkeypatch.setenv("HYPERAGENT_TOKEN_FILE", str(path))
    monkeypatch.delenv("HYPERAGENT_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="there is no access token"):
        read_token()
    token = ensure_token()
    assert len(token) >= 32
    assert ensure_token() == read_token() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["token"]
    monkeypatch.setenv("HYPERAGENT_TOKEN", "given")
    assert ensure_token() == "given"


@pytest.mark.parametrize(
    "header", [None, "", "secret", "Basic secret", "bearer secret", "Bearer secret ", "Bearer sécret"]
)
def test_other_headers_are_not_authorised(header: str | None) -> None:
    assert not is_authorised(header, "secret")
    assert is_authorised("Bearer secret", "secret")


class Settings(StrictModel):
    size: int = Field(ge=1)
    name: str = "x"


def test_configuration_names_every_bad_field(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("size: 2\n")
    assert load_yaml(path, Settings) == Settings(size=2)
    for text, message in (
        ("size: 0\nnaem: y\n", r"size: .*greater than or equal to 1; naem: Extra inputs"),
        ("size: [", "is not YAML"),
        ("", "size: Field required"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as refused:
            load_yaml(path, Settings)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="there is no file"):
        load_yaml(tmp_path / "none", Settings)
