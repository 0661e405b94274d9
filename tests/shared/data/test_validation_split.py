"""Tests of the validation split, and of the checks that nothing leaks from one split into another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_rows import many_rows, write_json_lines, write_parquet
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.disjoint import require_disjoint
from hyperagent.data.files.side_tables import read_sources
from hyperagent.data.files.tokens_file import HELD_OUT, HELD_OUT_TASKS, TRAIN, VALIDATION, read_data_identity
from hyperagent.data.files.tokens_rows import read_tokens_rows
from hyperagent.data.pipeline.split import SplitSettings, assign_splits
from hyperagent.data.pipeline.tokenize_dataset import JoinedFiles, TokenizeReport, TokenizeSettings, tokenize_file
from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.errors import DataError


@given(
    st.sets(st.text(min_size=1, max_size=5), min_size=3, max_size=30),
    st.floats(0.01, 0.6),
    st.floats(0.01, 0.39),
    st.integers(0, 9),
)
def test_validation_takes_from_training_only(repos: set[str], held_out: float, validation: float, seed: int) -> None:
    without = assign_splits(repos, held_out_share=held_out, seed=seed)
    splits = assign_splits(sorted(repos) * 2, held_out_share=held_out, validation_share=validation, seed=seed)
    assert set(splits) == repos
    assert set(splits.values()) == {TRAIN, VALIDATION, HELD_OUT}
    if len(repos) - round(held_out * len(repos)) >= 2:
        assert {r for r in repos if splits[r] == HELD_OUT} == {r for r in repos if without[r] == HELD_OUT}
    require_disjoint(splits.items())


def test_shares_are_of_all_repositories() -> None:
    repos = [f"a/{number}" for number in range(50)]
    splits = list(assign_splits(repos, held_out_share=0.2, validation_share=0.1, seed=3).values())
    assert (splits.count(HELD_OUT), splits.count(VALIDATION), splits.count(TRAIN)) == (10, 5, 35)


def test_splits_that_leave_nothing_for_training_are_refused() -> None:
    with pytest.raises(DataError, match="at least three of them with a validation share, but the data have 2"):
        assign_splits(["a/b", "a/c"], held_out_share=0.5, validation_share=0.1, seed=0)
    with pytest.raises(ValidationError, match="leave no repository for training"):
        SplitSettings(held_out_share=0.5, validation_share=0.5)


def tokenize(
    source: Path, target: Path, tokenizer: ChatTokenizer, *, extra: Path | None = None, **split: Any
) -> TokenizeReport:
    views = ViewSettings(condition=("task", "extra") if extra else ("task",))
    settings = TokenizeSettings(views=views, split=SplitSettings(**split))
    return tokenize_file(source, target, tokenizer, settings, joined=JoinedFiles(extra=extra))


def test_the_tokens_file_holds_three_disjoint_sides(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source, target = write_parquet(tmp_path / "d.parquet", many_rows(60, repos=10)), tmp_path / "t.parquet"
    report = tokenize(source, target, tokenizer, held_out_share=0.2, validation_share=0.3, held_out_tasks_share=0.4)
    # Ten repositories with six tasks each: two are held out, three validate, five train with two of their tasks unseen.
    assert report.splits == {TRAIN: 20, VALIDATION: 18, HELD_OUT: 12, HELD_OUT_TASKS: 10}
    rows = read_tokens_rows(target)
    require_disjoint((row.repo, row.split) for row in rows)
    repos = {split: {row.repo for row in rows if row.split == split} for split in report.splits}
    assert {split: len(of_split) for split, of_split in repos.items()} == {
        TRAIN: 5,
        VALIDATION: 3,
        HELD_OUT: 2,
        HELD_OUT_TASKS: 5,
    }
    assert read_data_identity(target).settings["split"]["validation_share"] == 0.3


def test_without_a_validation_share_nothing_is_recorded(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source, target = write_parquet(tmp_path / "d.parquet", many_rows()), tmp_path / "t.parquet"
    assert tokenize(source, target, tokenizer).splits[VALIDATION] == 0
    assert set(read_data_identity(target).settings["split"]) == {
        "held_out_share",
        "held_out_tasks_share",
        "by",
        "seed",
    }


def test_a_validation_split_without_a_usable_row_is_an_error(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    data = many_rows()
    splits = assign_splits([row["repo"] for row in data], held_out_share=0.2, validation_share=0.2, seed=0)
    for entry in data:
        if splits[entry["repo"]] == VALIDATION:
            # Half of a surrogate pair: selection accepts the row, tokenization refuses it.
            entry["trajectory"][1]["content"] = "\ud800"
    source = write_json_lines(tmp_path / "d.jsonl", data)
    with pytest.raises(DataError, match=r"is left in the validation split \(3 of 12 refused"):
        tokenize(source, tmp_path / "t.parquet", tokenizer, held_out_share=0.2, validation_share=0.2)


@pytest.mark.parametrize(
    ("splits", "named"),
    [
        ({TRAIN, HELD_OUT}, "held_out and train"),
        ({TRAIN, VALIDATION}, "train and validation"),
        ({VALIDATION, HELD_OUT}, "held_out and validation"),
        ({HELD_OUT_TASKS, HELD_OUT}, "held_out and held_out_tasks"),
        ({HELD_OUT_TASKS, VALIDATION, TRAIN}, "held_out_tasks and train and validation"),
    ],
)
def test_a_repository_in_two_splits_is_detected(splits: set[str], named: str) -> None:
    sound = [("a/x", TRAIN), ("a/x", HELD_OUT_TASKS), ("a/y", HELD_OUT), ("a/z", VALIDATION)] * 2
    require_disjoint(sound)
    with pytest.raises(DataError, match=f"the repository b/leak is in the splits {named}, so"):
        require_disjoint([*sound, *(("b/leak", split) for split in splits)])
    with pytest.raises(DataError, match=r"the repository a/y \(and 1 other repositories\)"):
        require_disjoint([*sound, ("a/y", TRAIN), *(("b/leak", split) for split in splits)])


def test_an_extra_text_with_a_held_out_task_is_refused(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    data = many_rows(40)
    source = write_parquet(tmp_path / "d.parquet", data)

    def texts(source_of: dict[str, str]) -> Path:
        lines = [
            {"instance_id": entry["instance_id"], "text": "x", "sources": [source_of[entry["instance_id"]]]}
            for entry in data
        ]
        return write_json_lines(tmp_path / "extra.jsonl", lines)

    # Instances are a__R-N with N = R, R + 4, ...: the text of each holds the one before it, that of the first itself.
    numbers = {entry["instance_id"]: number for number, entry in enumerate(data)}
    before = {name: f"a__{number % 4}-{max(number - 4, number % 4)}" for name, number in numbers.items()}
    after = {name: f"a__{number % 4}-{min(number + 4, 36 + number % 4)}" for name, number in numbers.items()}
    target = tmp_path / "t.parquet"
    split: dict[str, Any] = {"held_out_share": 0.25, "held_out_tasks_share": 0.3}
    assert tokenize(source, target, tokenizer, extra=texts(before), by="time", **split).splits[HELD_OUT_TASKS] == 9
    target.unlink()
    for leaking, by in ((after, "time"), (before, "hash")):
        with pytest.raises(DataError, match=r"\(train\) holds a trajectory of a__\d-\d+ \(held_out_tasks\)"):
            tokenize(source, target, tokenizer, extra=texts(leaking), by=by, **split)
    assert not target.exists()
    # Without held-out tasks nothing of a repository can leak into another split.
    tokenize(source, target, tokenizer, extra=texts(after), held_out_share=0.25)


def test_sources_are_read_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    write_json_lines(
        path, [{"instance_id": "a", "text": "x", "sources": ["b", "c"]}, {"instance_id": "d", "text": "y"}]
    )
    assert read_sources(path) == {"a": ("b", "c")}
    for wrong in ("b", [1]):
        write_json_lines(path, [{"instance_id": "a", "text": "x", "sources": wrong}])
        with pytest.raises(DataError, match="must be a list of instance ids"):
            read_sources(path)
