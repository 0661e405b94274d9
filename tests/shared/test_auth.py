"""Tests of the access token: two services that start at once, and folders that cannot be written."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from hyperagent.auth import ensure_token, is_authorized, read_token
from hyperagent.errors import ConfigError


def test_services_that_start_together_agree_on_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERAGENT_TOKEN", raising=False)
    together = Barrier(8)

    def start(_number: int) -> str:
        together.wait()
        return ensure_token()

    with ThreadPoolExecutor(8) as pool:
        for attempt in range(30):
            path = tmp_path / str(attempt) / "token"
            monkeypatch.setenv("HYPERAGENT_TOKEN_FILE", str(path))
            assert set(pool.map(start, range(8))) == {path.read_text().strip()}
            assert [p.name for p in path.parent.iterdir()] == ["token"]


@pytest.fixture
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("HYPERAGENT_TOKEN", raising=False)
    monkeypatch.setenv("HYPERAGENT_TOKEN_FILE", str(tmp_path / "folder" / "token"))
    return tmp_path / "folder" / "token"


def test_a_token_that_cannot_be_made_says_what_to_set(token_file: Path) -> None:
    token_file.parent.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"cannot create .*token: .*; set HYPERAGENT_TOKEN, or HYPERAGENT_TOKEN_FILE"):
        ensure_token()


def test_an_empty_token_is_none_at_all(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token_file.parent.mkdir()
    token_file.write_text("\n")
    monkeypatch.setenv("HYPERAGENT_TOKEN", "  ")
    for ask in (read_token, ensure_token):
        with pytest.raises(ConfigError, match="there is no access token"):
            ask()


def test_the_environment_wins_over_the_file(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token_file.parent.mkdir()
    token_file.write_text("from-the-file\n")
    assert read_token() == "from-the-file"
    monkeypatch.setenv("HYPERAGENT_TOKEN", " from-the-environment ")
    assert read_token() == "from-the-environment"


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


@pytest.mark.parametrize("header", [None, "", "secret", "Basic secret", "Bearer secret ", "Bearer sécret"])
def test_other_headers_are_not_authorized(header: str | None) -> None:
    assert not is_authorized(header, "secret")
    assert is_authorized("Bearer secret", "secret")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"caf\xc3\xa9", "has characters that a request cannot carry"),
        (b"two words", "has characters that a request cannot carry"),
        (b"\xff\xfes\x00", "is not text in UTF-8"),
        (b" \n", "there is no access token"),
    ],
)
def test_a_token_that_cannot_be_used_is_one_line(
    content: bytes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYPERAGENT_TOKEN", raising=False)
    monkeypatch.setenv("HYPERAGENT_TOKEN_FILE", str(tmp_path / "token"))
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ConfigError, match=why) as refused:
        read_token()
    assert "\n" not in str(refused.value)


def test_a_byte_order_mark_is_no_part_of_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERAGENT_TOKEN", raising=False)
    monkeypatch.setenv("HYPERAGENT_TOKEN_FILE", str(tmp_path / "token"))
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbfsecret\r\n")
    assert read_token() == "secret"


def test_a_token_of_the_environment_has_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERAGENT_TOKEN", "schl\u00fcssel")
    with pytest.raises(ConfigError, match="the access token in HYPERAGENT_TOKEN has characters"):
        read_token()


def test_a_token_file_that_is_a_folder_or_unreadable_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYPERAGENT_TOKEN", raising=False)
    monkeypatch.setenv("HYPERAGENT_TOKEN_FILE", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot read the access token"):
        read_token()


def test_without_a_home_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HYPERAGENT_TOKEN", "HYPERAGENT_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="set HYPERAGENT_TOKEN, HYPERAGENT_TOKEN_FILE or HOME"):
        read_token()
