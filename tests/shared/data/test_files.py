"""Tests of reading a data file, splitting it by repository, and writing the tokens file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_identity import data_identity
from data_rows import LAST, USER, many_rows, row, write_json_lines, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.reader import count_rows, read_rows, read_rows_or_refusals, read_schema_differences
from hyperagent.data.files.tokens_file import (
    HELD_OUT,
    HELD_OUT_TASKS,
    TRAIN,
    VALIDATION,
    read_data_identity,
    read_tokens,
    write_tokens,
)
from hyperagent.data.pipeline.selection import Selection
from hyperagent.data.pipeline.split import SplitSettings, assign_splits
from hyperagent.data.pipeline.tokenize_dataset import JoinedFiles, TokenizeReport, TokenizeSettings, tokenize_file
from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.errors import DataError, RowRefused


def test_rows_come_in_order_across_row_groups(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", many_rows(40))
    assert count_rows(path) == 40
    assert [data["trajectory_id"] for data in read_rows(path)] == [f"t{n}" for n in range(40)]


def test_json_lines_give_the_same_rows(tmp_path: Path) -> None:
    rows = many_rows()
    parquet = write_parquet(tmp_path / "d.parquet", rows)
    lines = write_json_lines(tmp_path / "d.jsonl", rows)
    lines.write_text(f"\n{lines.read_text()}\n\n")
    assert count_rows(lines) == 12
    for one, other in zip(read_rows(parquet), read_rows(lines), strict=True):
        assert one["trajectory"][0]["content"] == other["trajectory"][0]["content"]
        assert {name: one[name] for name in ("trajectory_id", "repo", "resolved")} == {
            name: other[name] for name in ("trajectory_id", "repo", "resolved")
        }


def test_a_line_that_is_no_row_is_refused_alone(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    whole = json.dumps(row(USER, LAST))
    path.write_text(f"{whole}\n{{oops\n[1]\n{'[' * 100_000}\n{whole[:-1]}\n{whole}\n")
    found = list(read_rows_or_refusals(path))
    refused = [(refusal.trajectory_id, refusal.reason) for refusal in found if isinstance(refusal, RowRefused)]
    assert [name for name, _ in refused] == ["row 1", "row 2", "row 3", "row 4"]
    for (_, reason), why in zip(
        refused, ("not JSON", "a JSON list, not an object", "not JSON", "not JSON"), strict=True
    ):
        assert why in reason
        assert "\n" not in reason
    assert len(found) == 6
    with pytest.raises(RowRefused, match="row 1"):
        list(read_rows(path))


def test_a_line_of_many_megabytes_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with path.open("w") as file:
        file.write('{"trajectory_id": "' + "x" * (65 << 20) + '"}\n')
        file.write(json.dumps(row(USER, LAST)) + "\n")
    first, second = read_rows_or_refusals(path)
    assert isinstance(first, RowRefused)
    assert "longer than 67,108,864 bytes" in first.reason
    assert not isinstance(second, RowRefused)
    assert count_rows(path) == 2


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    for name in ("none.parquet", "none.jsonl"):
        with pytest.raises(DataError, match="there is no file"):
            count_rows(tmp_path / name)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(DataError, match=r"is not a Parquet file.*JSON Lines must be named \*\.jsonl"):
        count_rows(tmp_path / "text.parquet")
    pq.write_table(pa.table({"repo": [1], "trajectory": ["x"]}), tmp_path / "other.parquet")
    differences = read_schema_differences(tmp_path / "other.parquet")
    for part in ("trajectory_id (string) is missing", "tools (list) is missing", "repo is integer, not string"):
        assert part in differences
    assert "trajectory is string, not list" in differences
    pq.write_table(pa.table({"repo": ["a/b"], "text": ["x"]}), tmp_path / "none.parquet")
    with pytest.raises(
        DataError, match=r"has no column with messages: it has repo, text, but none of trajectory, messages"
    ):
        next(read_rows(tmp_path / "none.parquet"))


@given(st.sets(st.text(min_size=1, max_size=5), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 9))
def test_both_sides_have_a_repository_in_any_order_of_reading(repos: set[str], share: float, seed: int) -> None:
    splits = assign_splits(sorted(repos), held_out_share=share, seed=seed)
    assert splits == assign_splits(sorted(repos, reverse=True) * 2, held_out_share=share, seed=seed)
    assert set(splits) == repos
    assert set(splits.values()) == {TRAIN, HELD_OUT}


def test_one_repository_cannot_be_split() -> None:
    with pytest.raises(DataError, match="at least two"):
        assign_splits(["a/b", "a/b"], held_out_share=0.5, seed=0)


def tokenize(source: Path, target: Path, tokenizer: ChatTokenizer, **options: Any) -> TokenizeReport:
    """Tokenize with short limits; `views`, `selection` and `split` change some settings."""
    settings = TokenizeSettings(
        views=ViewSettings(**{"condition": ("task",), "max_tokens": 1000, **options.pop("views", {})}),
        selection=Selection(**options.pop("selection", {})),
        split=SplitSettings(**{"held_out_share": 0.25, **options.pop("split", {})}),
    )
    return tokenize_file(source, target, tokenizer, settings, **options)


def test_a_repository_is_never_on_both_sides(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write_parquet(tmp_path / "d.parquet", many_rows())
    report = tokenize(source, tmp_path / "t.parquet", tokenizer)
    assert (report.rows, report.chosen, report.refused) == (12, 12, ())
    assert report.splits == {TRAIN: 9, VALIDATION: 0, HELD_OUT: 3, HELD_OUT_TASKS: 0}
    trajectories = list(read_tokens(tmp_path / "t.parquet"))
    sides = {split: {t.repo for t in trajectories if t.split == split} for split in (TRAIN, HELD_OUT)}
    assert not sides[TRAIN] & sides[HELD_OUT]
    assert report.tokens == sum(len(t.token_ids) for t in trajectories) == report.student_tokens
    assert report.supervised_tokens == sum(len(t.positions) for t in trajectories)
    assert report.prompt_tokens == sum(len(t.prompt_ids) for t in trajectories)


def test_worker_processes_give_the_same_file(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    data = many_rows(30)
    data[7]["trajectory"] = []
    data[9]["trajectory"][1]["content"] = "the cat " * 2000
    source = write_parquet(tmp_path / "d.parquet", data)
    alone = tokenize(source, tmp_path / "1.parquet", tokenizer, num_workers=1)
    together = tokenize(source, tmp_path / "2.parquet", tokenizer, num_workers=2)
    assert [str(refusal) for refusal in alone.refused] == [str(refusal) for refusal in together.refused]
    assert replace(alone, refused=()) == replace(together, refused=())
    assert alone.too_long == 1
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


def test_a_sample_is_drawn_by_the_seed(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write_parquet(tmp_path / "d.parquet", many_rows())

    def drawn(seed: int) -> list[str]:
        report = tokenize(source, tmp_path / "t.parquet", tokenizer, selection={"sample": 6, "seed": seed})
        assert report.left_out == {"not in the sample": 6}
        return [t.trajectory_id for t in read_tokens(tmp_path / "t.parquet")]

    assert len(drawn(0)) == 6
    assert drawn(0) == drawn(0) != drawn(1)


def test_a_refused_row_is_named_and_the_others_go_on(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    data = many_rows()
    data[4]["trajectory"] = []
    data[5]["trajectory_id"] = "t3"
    data[6]["trajectory"][1]["content"] = "the cat " * 2000
    source = write_parquet(tmp_path / "d.parquet", data)
    report = tokenize(source, tmp_path / "t.parquet", tokenizer)
    assert [str(refused) for refused in report.refused[:2]] == [
        "trajectory 't4': it has no assistant message, so there is nothing to learn from",
        "trajectory 't3': row 5 has the id of an earlier row",
    ]
    assert report.refused[2].trajectory_id == "t6"
    assert "the limit is 1000" in report.refused[2].reason
    assert (sum(report.splits.values()), report.too_long) == (9, 1)
    for strict, name in (({4: 0, 5: 0}, "t6"), ({5: 0}, "t4")):
        kept = [entry for number, entry in enumerate(data) if number not in strict]
        with pytest.raises(RowRefused, match=name):
            tokenize(write_parquet(tmp_path / "s.parquet", kept), tmp_path / "s.tokens", tokenizer, strict=True)
        assert not (tmp_path / "s.tokens").exists()


def test_nothing_left_stops_it(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write_parquet(tmp_path / "d.parquet", many_rows())
    with pytest.raises(DataError, match=r"no usable trajectory .* \(12 of 12 refused, 0 left out\); the first refusal"):
        tokenize(source, tmp_path / "t.parquet", tokenizer, views={"max_tokens": 2})
    assert not (tmp_path / "t.parquet").exists()


def test_the_extra_text_is_joined_by_instance(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    data = many_rows()
    source = write_parquet(tmp_path / "d.parquet", data)
    extras = [{"instance_id": entry["instance_id"], "text": f"map {number}"} for number, entry in enumerate(data)]
    extra = write_json_lines(tmp_path / "extra.jsonl", extras[1:])
    views = {"condition": ("task", "extra")}
    report = tokenize(source, tmp_path / "t.parquet", tokenizer, views=views, joined=JoinedFiles(extra=extra))
    assert [str(refused) for refused in report.refused] == [
        "trajectory 't0': it has no extra text, which the condition requires"
    ]
    prompts = [tokenizer.decode(t.prompt_ids.tolist()) for t in read_tokens(tmp_path / "t.parquet")]
    assert prompts == [f"<|im_start|>user\ntask {n}\n\nmap {n}<|im_end|>\n" for n in range(1, 12)]
    with pytest.raises(DataError, match="if and only if"):
        tokenize(source, tmp_path / "t.parquet", tokenizer, views=views)


def test_a_tokens_file_gives_back_what_was_written(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write_parquet(tmp_path / "d.parquet", many_rows(150, repos=30))
    views = {"internalized": ("task",)}
    tokenize(source, tmp_path / "a.parquet", tokenizer, views=views, split={"held_out_tasks_share": 0.4})
    before = list(read_tokens(tmp_path / "a.parquet"))
    assert {t.split for t in before} == {TRAIN, HELD_OUT, HELD_OUT_TASKS}
    identity = read_data_identity(tmp_path / "a.parquet")
    with write_tokens(tmp_path / "b.parquet", identity) as writer:
        for trajectory in before:
            writer.write(trajectory)
    assert read_data_identity(tmp_path / "b.parquet") == identity
    for one, other in zip(before, read_tokens(tmp_path / "b.parquet"), strict=True):
        for name in ("token_ids", "positions", "prompt_ids", "student_ids", "student_positions"):
            assert getattr(other, name).dtype == np.uint32
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert len(one.student_ids) < len(one.token_ids)
    with pytest.raises(DataError, match="is not a tokens file"):
        list(read_tokens(source))
    with pytest.raises(DataError, match="there is no tokens file"):
        list(read_tokens(tmp_path / "none.parquet"))


def test_a_writer_that_stops_halfway_leaves_the_file_before(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = tmp_path / "t.parquet"
    tokenize(write_parquet(tmp_path / "d.parquet", many_rows()), path, tokenizer)
    whole = path.read_bytes()
    trajectories = list(read_tokens(path))

    def stop_halfway() -> None:
        with write_tokens(path, data_identity(tokenizer.identity)) as writer:
            for trajectory in trajectories * 12:
                writer.write(trajectory)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert path.read_bytes() == whole
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["d.parquet", "t.parquet"]


def test_the_fingerprint_follows_everything_that_decides_the_ids(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write_parquet(tmp_path / "d.parquet", many_rows())
    target = tmp_path / "t.parquet"

    def fingerprint(**options: Any) -> str:
        report = tokenize(source, target, tokenizer, **options)
        assert read_data_identity(target).fingerprint == report.fingerprint
        return report.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    licenses = write_json_lines(
        tmp_path / "l.jsonl", [{"instance_id": f"a__{n % 4}-{n}", "license_name": "MIT"} for n in range(12)]
    )
    others = [
        fingerprint(views={"internalized": ("task",)}),
        fingerprint(views={"condition": ("system", "task")}),
        fingerprint(views={"max_tokens": 999}),
        fingerprint(selection={"resolved_only": True}),
        fingerprint(split={"seed": 1}),
        fingerprint(joined=JoinedFiles(licenses=licenses)),
    ]
    write_parquet(source, many_rows()[::-1])
    others.append(fingerprint())
    assert len({first, *others}) == 8


def test_the_real_pack_is_tokenized_to_its_manifest(real_data: Path, tmp_path: Path) -> None:
    """Token counts were computed independently, with `apply_chat_template` of the real tokenizer."""
    tokenizer = ChatTokenizer(real_data / "qwen-tokenizer")
    assert tokenizer.vocab_size == 151_669
    lines = (real_data / "trajectories" / "manifest.jsonl").read_text().splitlines()
    expected = {line["trajectory_id"]: line["tokens_qwen3coder_template"] for line in map(json.loads, lines)}
    settings = TokenizeSettings(selection=Selection(sample=12))
    source = real_data / "trajectories" / "dev.parquet"
    report = tokenize_file(source, tmp_path / "t.parquet", tokenizer, settings)
    assert report.refused == ()
    found = {t.trajectory_id: len(t.token_ids) for t in read_tokens(tmp_path / "t.parquet")}
    assert found == {name: expected[name] for name in found}
    assert len(found) == 12
