"""A small tokenizer with tools in its template."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tokenizer import make_tokenizer

from hyperagent.data.chat.tokenizer import ChatTokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_folder)
