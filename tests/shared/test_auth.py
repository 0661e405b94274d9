"""The access token where services meet: two starting at once, and folders that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hyperagent.auth import ensure_token, read_token
from hyperagent.errors import ConfigError


def test_services_that_start_together_agree_on_one_token(tmp_path: Path) -> None:
    path = tmp_path / "home" / "token"
    environment = {key: value for key, value in os.environ.items() if key != "HYPERAGENT_TOKEN"}
    environment["HYPERAGENT_TOKEN_FILE"] = str(path)
    # All wait for the same line, so that they race for the file.
    program = "import sys; from hyperagent.auth import ensure_token; sys.stdin.readline(); print(ensure_token())"
    services = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for service in services:
        assert service.stdin
        service.stdin.write("go\n")
        service.stdin.flush()
    tokens = {service.communicate()[0].strip() for service in services}
    assert tokens == {path.read_text().strip()}
    assert [p.name for p in path.parent.iterdir()] == ["token"]


@pytest.fixture
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("HYPERAGENT_TOKEN", raising=False)
    monkeypatch.setenv("HYPERAGENT_TOKEN_FILE", str(tmp_path / "folder" / "token"))
    return tmp_path / "folder" / "token"


def test_a_token_that_cannot_be_made_says_what_to_set(token_file: Path) -> None:
    token_file.parent.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"cannot make .*token: .*; set HYPERAGENT_TOKEN, or HYPERAGENT_TOKEN_FILE"):
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
