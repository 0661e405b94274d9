"""Reading a data file, splitting it by repository, and the tokens file that comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperagent.data.reader import count_rows, read_rows
from hyperagent.data.split import assign_splits
from hyperagent.data.tokenise import tokenise_file
from hyperagent.data.tokenizer import ChatTokenizer
from hyperagent.data.tokens import HELD_OUT, TRAIN, read_tokenizer_identity, read_tokens, write_tokens
from hyperagent.errors import DataError

CALLS = pa.list_(pa.struct([("function", pa.struct([("arguments", pa.string()), ("name", pa.string())]))]))
MESSAGE = pa.struct([("content", pa.string()), ("role", pa.string()), ("tool_calls", CALLS)])
TOOL = pa.struct([("function", pa.struct([("name", pa.string())])), ("type", pa.string())])
SCHEMA = pa.schema(
    [
        ("trajectory_id", pa.string()),
        ("repo", pa.string()),
        ("trajectory", pa.list_(MESSAGE)),
        ("tools", pa.list_(TOOL)),
    ]
)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=3)
    return path


def rows(count: int = 12, *, repos: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "trajectory_id": f"t{number}",
            "repo": f"a/{number % repos}",
            "trajectory": [
                {"role": "user", "content": f"task {number}"},
                {"role": "assistant", "content": "the cat sat " * (number + 1)},
            ],
            "tools": None,
        }
        for number in range(count)
    ]


def test_rows_come_in_order_across_row_groups(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.parquet", rows())
    assert count_rows(path) == 12
    assert [row["trajectory_id"] for row in read_rows(path)] == [f"t{n}" for n in range(12)]


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        count_rows(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(DataError, match="is not a Parquet file"):
        count_rows(tmp_path / "text.parquet")
    pq.write_table(pa.table({"repo": [1], "trajectory": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError) as refused:
        count_rows(tmp_path / "other.parquet")
    message = str(refused.value)
    for part in ("trajectory_id (string) is missing", "tools (", "repo is int64, not string", "trajectory is string"):
        assert part in message
    assert "\n" not in message


@given(st.sets(st.text(min_size=1, max_size=5), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 9))
def test_both_sides_have_a_repository_in_any_order_of_reading(repos: set[str], share: float, seed: int) -> None:
    splits = assign_splits(sorted(repos), held_out_share=share, seed=seed)
    assert splits == assign_splits(sorted(repos, reverse=True) * 2, held_out_share=share, seed=seed)
    assert set(splits) == repos
    assert set(splits.values()) == {TRAIN, HELD_OUT}


def test_one_repository_cannot_be_split() -> None:
    with pytest.raises(DataError, match="at least two"):
        assign_splits(["a/b", "a/b"], held_out_share=0.5, seed=0)


def tokenise(source: Path, target: Path, tokenizer: ChatTokenizer, **options: Any) -> Any:
    limits = {"max_tokens": 1000, "max_prompt_tokens": 100, "held_out_share": 0.25, **options}
    return tokenise_file(source, target, tokenizer, **limits)


def test_a_repository_is_never_on_both_sides(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write_rows(tmp_path / "d.parquet", rows())
    report = tokenise(source, tmp_path / "t.parquet", tokenizer)
    assert (report.rows, report.chosen, report.train, report.held_out, report.refused) == (12, 12, 9, 3, ())
    trajectories = list(read_tokens(tmp_path / "t.parquet"))
    sides = {split: {t.repo for t in trajectories if t.split == split} for split in (TRAIN, HELD_OUT)}
    assert not sides[TRAIN] & sides[HELD_OUT]
    assert report.tokens == sum(len(t.token_ids) for t in trajectories)
    assert report.supervised_tokens == sum(len(t.positions) for t in trajectories)
    assert read_tokenizer_identity(tmp_path / "t.parquet") == tokenizer.identity


def test_a_sample_is_drawn_by_the_seed(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write_rows(tmp_path / "d.parquet", rows())

    def drawn(seed: int) -> list[str]:
        tokenise(source, tmp_path / "t.parquet", tokenizer, sample=6, seed=seed)
        return [t.trajectory_id for t in read_tokens(tmp_path / "t.parquet")]

    assert len(drawn(0)) == 6
    assert drawn(0) == drawn(0) != drawn(1)


def test_a_refused_row_is_named_and_the_others_go_on(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    data = rows()
    data[4]["trajectory"] = []
    report = tokenise(write_rows(tmp_path / "d.parquet", data), tmp_path / "t.parquet", tokenizer)
    assert [str(refused) for refused in report.refused] == [
        "trajectory 't4': it has no assistant message, so nothing to learn from"
    ]
    assert report.train + report.held_out == 11


def test_nothing_left_and_twice_the_same_id_stop_it(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write_rows(tmp_path / "d.parquet", rows())
    with pytest.raises(
        DataError, match=r"no usable trajectory .* \(12 of 12 refused\); the first refusal: trajectory 't0'"
    ):
        tokenise(source, tmp_path / "t.parquet", tokenizer, max_tokens=2)
    twice = write_rows(tmp_path / "twice.parquet", [*rows(), rows()[3]])
    with pytest.raises(DataError, match="t3"):
        tokenise(twice, tmp_path / "t.parquet", tokenizer)
    assert not (tmp_path / "t.parquet").exists()


def test_a_tokens_file_gives_back_what_was_written(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    tokenise(write_rows(tmp_path / "d.parquet", rows()), tmp_path / "a.parquet", tokenizer)
    before = list(read_tokens(tmp_path / "a.parquet"))
    write_tokens(tmp_path / "b.parquet", before, tokenizer.identity)
    for one, other in zip(before, read_tokens(tmp_path / "b.parquet"), strict=True):
        for name in ("token_ids", "positions", "prompt_ids"):
            assert getattr(other, name).dtype == np.uint32
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    with pytest.raises(DataError, match="is not a tokens file"):
        list(read_tokens(tmp_path / "d.parquet"))
    with pytest.raises(DataError, match="there is no tokens file"):
        list(read_tokens(tmp_path / "none.parquet"))


def test_the_real_pack_is_tokenised_to_its_manifest(real_data: Path, tmp_path: Path) -> None:
    """Token counts made independently, by `apply_chat_template` of the real tokenizer."""
    tokenizer = ChatTokenizer(real_data / "qwen-tokenizer")
    assert tokenizer.vocab_size == 151_669
    lines = (real_data / "trajectories" / "manifest.jsonl").read_text().splitlines()
    expected = {line["trajectory_id"]: line["tokens_qwen3coder_template"] for line in map(json.loads, lines)}
    report = tokenise_file(
        real_data / "trajectories" / "dev.parquet",
        tmp_path / "t.parquet",
        tokenizer,
        max_tokens=131_072,
        max_prompt_tokens=32_768,
        sample=12,
    )
    assert report.refused == ()
    found = {t.trajectory_id: len(t.token_ids) for t in read_tokens(tmp_path / "t.parquet")}
    assert found == {name: expected[name] for name in found}
    assert len(found) == 12
