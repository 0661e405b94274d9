"""Fixtures: a small tokenizer with tools in its template, and the real data pack if it is next to the project."""

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


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real agent trajectories and the real tokenizer; tests that need it are skipped without it."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not (folder / "trajectories" / "dev.parquet").is_file():
        pytest.skip(f"the real data are not in {folder}")
    return folder
