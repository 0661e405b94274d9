"""Tests of the paths in a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperagent.errors import ConfigError
from hyperagent_trainer.config import load_recipe


def test_a_home_folder_is_expanded_and_other_paths_are_relative_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("student: ~/student\ntokens: ../tokens\ncache: s3://bucket/~cache\n")
    loaded = load_recipe(recipe)
    assert loaded.student == (tmp_path / "home/student").resolve()
    assert loaded.tokens == (tmp_path.parent / "tokens").resolve()
    assert loaded.cache == "s3://bucket/~cache"


def test_an_unknown_home_folder_is_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("student: ~no-such-user-here/student\ntokens: t\ncache: c\n")
    with pytest.raises(ConfigError, match=r"student: .*home folder that is not known"):
        load_recipe(recipe)
