"""Tests of `hyperagent data extra` and `potential`, and of the options for extra texts and validation, as commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import many_rows, row, write_json_lines, write_parquet
from typer.testing import CliRunner

from hyperagent.cli.main import build_app
from hyperagent.data.files.tokens_file import read_tokens
from hyperagent.errors import ConfigError, DataError


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(build_app(), ["data", *map(str, arguments)], catch_exceptions=True)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def as_json(*arguments: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return 12 rows of four repositories with three issues each, in which every assistant writes its own rule."""
    rows = many_rows()
    for number, entry in enumerate(rows):
        rule = f"rule{number % 4}"
        entry["trajectory"] = row(
            {"role": "user", "content": f"task {number}"}, {"role": "assistant", "content": rule}
        )["trajectory"]
    return write_parquet(tmp_path / "d.parquet", rows)


def test_from_earlier_trajectories_to_tokens(source: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    extra, tokens = tmp_path / "extra.jsonl", tmp_path / "tokens.parquet"
    made = as_json("extra", source, "--out", extra, "--from", "earlier-trajectory", "--trajectories", "2")
    assert (made["texts"], made["trajectories"]) == (8, 12)
    assert made["without_earlier"] == ["a__0-0", "a__1-1", "a__2-2", "a__3-3"]
    assert "4 tasks, which have no text" in run("extra", source, "--out", extra)

    views: list[str | Path] = [
        "--condition",
        "task",
        "--condition",
        "extra",
        "--extra",
        extra,
        "--extra-in-teacher",
        "task",
    ]
    shown = as_json("show", source, "t9", "--tokenizer", tokenizer_folder, *views)
    assert "task 9\n\nEarlier issue: task 5" in shown["segments"][0]["text"]
    assert as_json("show", source, "t9", "--tokenizer", tokenizer_folder, *views, "--view", "student")["tokens"] < 60

    options = ["--held-out-share", "0.25", "--validation-share", "0.25"]
    report = as_json("tokenize", source, tokens, "--tokenizer", tokenizer_folder, *views, *options)
    counts = {name: report[name] for name in ("train", "validation", "held_out", "held_out_tasks")}
    assert counts == {"train": 4, "validation": 2, "held_out": 2, "held_out_tasks": 0}
    assert {entry["trajectory_id"] for entry in report["refused"]} == {"t0", "t1", "t2", "t3"}
    assert report["tokens"] > report["student_tokens"]
    split = as_json("split", source, *options)
    for name in ("train", "validation", "held_out"):
        assert set(split[name]["repos"]) == {t.repo for t in read_tokens(tokens, split=name)}


def test_the_potential_of_views(source: Path, tmp_path: Path) -> None:
    full = as_json("potential", source)
    assert full["words"] == {"supervised": 12, "in_hidden": 0, "unseen": 0, "rare": 0, "potential": 0.0}
    assert full["verdict"].startswith("nothing to distill here")

    texts = [{"instance_id": f"a__{n % 4}-{n}", "text": f"Follow rule{n % 4}."} for n in range(12)]
    extra = write_json_lines(tmp_path / "card.jsonl", texts)
    views: list[str | Path] = ["--condition", "task", "--condition", "extra", "--extra", extra]
    cards = as_json("potential", source, *views)
    assert cards["words"] == {"supervised": 12, "in_hidden": 12, "unseen": 12, "rare": 12, "potential": 1.0}
    assert {repo["repo"]: repo["examples"] for repo in cards["repos"]} == {f"a/{n}": {f"rule{n}": 3} for n in range(4)}
    text = run("potential", source, *views)
    assert "a/2 (rows: 3): 100.00% of 3 words: rule2 3" in text
    assert "12 of these are rare in other repositories: 100.00% of all" in text

    # The teacher's rows cannot depend on a text that it does not see.
    assert as_json("potential", source, *views, "--extra-in-teacher", "none")["words"]["rare"] == 0
    assert as_json("potential", source, "--sample", "5")["trajectories"] == 5


def test_wrong_options_are_one_error(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="if and only if a file with extra texts is given"):
        run("potential", source, "--condition", "task", "--condition", "extra")
    with pytest.raises(ConfigError, match="8 earlier trajectories need 1600 characters"):
        run("extra", source, "--out", tmp_path / "e.jsonl", "--trajectories", "8", "--max-characters", "500")
    with pytest.raises(ConfigError, match="leave no repository for training"):
        run("split", source, "--held-out-share", "0.6", "--validation-share", "0.4")
