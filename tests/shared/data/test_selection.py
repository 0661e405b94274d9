"""Tests of the selection and the split of rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_rows import LAST, many_rows, row, write_json_lines, write_parquet

from hyperagent.data.files.side_tables import read_joined
from hyperagent.data.files.tokens_file import HELD_OUT, HELD_OUT_TASKS, TRAIN
from hyperagent.data.pipeline.selection import Selected, Selection, select_rows
from hyperagent.data.pipeline.split import SplitSettings, split_rows
from hyperagent.errors import DataError, RowRefused


def select(path: Path, rows: list[dict[str, Any]], license_of: Any = None, **selection: Any) -> Selected:
    source = write_parquet(path / "d.parquet", rows)
    return select_rows(source, Selection(**selection), license_of=license_of)


def names(selected: Selected) -> list[str]:
    return [fact.name for fact in selected.rows]


def attempt(number: int, repo: str, task: str, instance_id: str = "a__b-1") -> dict[str, Any]:
    user = {"role": "user", "content": task}
    return row(user, LAST, tools=[], trajectory_id=f"t{number}", repo=repo, instance_id=instance_id)


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        (1, True), (True, True), (1.0, True), ("true", True), ("True", True), ("1", True),
        (0, False), (False, False), (0.0, False), ("False", False), ("false", False), ("0", False),
        (None, False), (float("nan"), False),
        ("yes", None), ("", None), (2, None), ([], None), ("NaN", None),
    ],
)  # fmt: skip
def test_a_mark_of_resolved_is_read_strictly(value: Any, outcome: bool | None, tmp_path: Path) -> None:
    rows = [{**data, "resolved": 1 if number else value} for number, data in enumerate(many_rows())]
    source = tmp_path / "d.jsonl"
    source.write_text("".join(json.dumps(data) + "\n" for data in rows))
    found = select_rows(source, Selection(resolved_only=True))
    assert ("t0" in names(found)) is bool(outcome)
    assert found.left_out == ({"not resolved": 1} if outcome is False else {})
    reasons = [refusal.reason for refusal in found.refused]
    assert len(reasons) == (outcome is None)
    assert all("which is neither true nor false" in reason for reason in reasons)
    # Where the mark decides nothing, it refuses nothing.
    assert len(select_rows(source, Selection()).rows) == 12


def test_outcome_and_exit_status(tmp_path: Path) -> None:
    selected = select(tmp_path, many_rows(), resolved_only=True, exit_statuses=("submit",))
    assert names(selected) == [f"t{n}" for n in range(12) if n % 2 and n % 3]
    assert selected.left_out == {"not resolved": 6, "another exit status": 2}
    assert (selected.num_rows, selected.refused) == (12, ())


def test_licenses_are_joined_by_instance(tmp_path: Path) -> None:
    rows = many_rows(4)
    license_of = {rows[0]["instance_id"]: "MIT", rows[1]["instance_id"]: "GPL-3.0", rows[2]["instance_id"]: "MIT"}
    selected = select(tmp_path, rows, license_of, licenses=("MIT",))
    assert names(selected) == ["t0", "t2"]
    assert selected.left_out == {"another license, or none known": 2}
    with pytest.raises(DataError, match="give a file with instance_id and license_name with --licenses"):
        select(tmp_path, rows, licenses=("MIT",))


def test_an_issue_of_another_repository_is_a_duplicate(tmp_path: Path) -> None:
    issue = "<issue_description>\nMean of nothing  raises\n</issue_description>"
    rows = [
        attempt(0, "a/b", f"<uploaded_files>\n/workspace/b\n</uploaded_files>\n{issue}"),
        attempt(1, "a/b", f"Second attempt. {issue}"),
        attempt(2, "fork/b", f"<uploaded_files>\n/workspace/b2\n</uploaded_files>\n{issue.lower()}"),
        attempt(3, "fork/b", "Something else"),
    ]
    selected = select(tmp_path, rows)
    assert names(selected) == ["t0", "t1", "t3"]
    assert selected.left_out == {"issue of another repository": 1}
    # A row that is not selected does not make other rows duplicates.
    rows[0]["resolved"] = rows[1]["resolved"] = 0
    rows[2]["resolved"] = rows[3]["resolved"] = 1
    assert names(select(tmp_path, rows, resolved_only=True)) == ["t2", "t3"]


def test_rows_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    rows = many_rows(6)
    rows[1]["trajectory"] = []
    rows[3]["trajectory_id"] = None
    rows[4]["trajectory_id"] = "t0"
    selected = select(tmp_path, rows)
    assert [(refusal.trajectory_id, refusal.reason.split(",")[0]) for refusal in selected.refused] == [
        ("t1", "it has no assistant message"),
        ("t0", "row 4 has the id of an earlier row"),
    ]
    assert names(selected) == ["t0", "t2", names(selected)[2], "t5"]
    assert names(selected)[2].startswith("made-")
    with pytest.raises(RowRefused, match="t1"):
        select_rows(tmp_path / "d.parquet", Selection(), strict=True)


def test_nothing_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row of .* is left \(0 of 4 refused, 4 not selected\)"):
        select(tmp_path, many_rows(4), exit_statuses=("never",))


def split(rows: list[dict[str, Any]], path: Path, **settings: Any) -> dict[str, str]:
    selected = select(path, rows)
    splits = split_rows(selected.rows, SplitSettings(**settings))
    return {fact.name: splits[fact.number] for fact in selected.rows}


@pytest.mark.parametrize("by", ["hash", "time"])
def test_attempts_at_one_issue_stay_on_one_side(by: str, tmp_path: Path) -> None:
    rows = [
        attempt(
            number, f"a/{number % 3}", f"task {number // 6} of {number % 3}", f"a__{number % 3}-{100 - number // 6}"
        )
        for number in range(60)
    ]
    sides = split(rows, tmp_path, held_out_share=0.3, held_out_tasks_share=0.3, by=by)
    assert Counter(sides.values()) == {TRAIN: 28, HELD_OUT: 20, HELD_OUT_TASKS: 12}
    held_out = {int(name[1:]) % 3 for name, side in sides.items() if side == HELD_OUT}
    assert len(held_out) == 1
    for number in range(60):
        attempts = {sides[f"t{n}"] for n in range(60) if n // 6 == number // 6 and n % 3 == number % 3}
        assert len(attempts) == 1
    if by == "time":
        # The highest issue numbers are the newest tasks, which are held out first.
        newest = {number // 6 for number in range(60) if sides[f"t{number}"] == HELD_OUT_TASKS}
        assert newest == {0, 1, 2}


def test_a_repository_with_one_task_keeps_it(tmp_path: Path) -> None:
    rows = [attempt(number, f"a/{number}", f"task {number}") for number in range(4)]
    assert HELD_OUT_TASKS not in split(rows, tmp_path, held_out_tasks_share=0.9).values()


def test_time_needs_issue_numbers(tmp_path: Path) -> None:
    rows = [attempt(number, f"a/{number % 2}", f"task {number}", "a__b-main") for number in range(8)]
    with pytest.raises(DataError, match=r"ends in no issue number .* split with --by hash"):
        split(rows, tmp_path, held_out_tasks_share=0.5, by="time")


def test_joined_files(tmp_path: Path) -> None:
    rows = [{"instance_id": "a", "license_name": "MIT"}, {"instance_id": "b", "license_name": "BSD\u2028"}]
    lines = write_json_lines(tmp_path / "l.jsonl", [*rows, rows[0]])
    pq.write_table(pa.Table.from_pylist([{**r, "more": 1} for r in rows]), tmp_path / "l.parquet")
    expected = {"a": "MIT", "b": "BSD\u2028"}
    assert read_joined(lines, "license_name") == read_joined(tmp_path / "l.parquet", "license_name") == expected


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no file"),
        ('{"instance_id": "a"}\n', "in every line: KeyError 'text'"),
        ("{oops\n", "JSONDecodeError"),
        ("[1]\n", "TypeError"),
        ('{"instance_id": 1, "text": "x"}\n', "both must be text"),
        ('{"instance_id": "a", "text": "x"}\n{"instance_id": "a", "text": "y"}\n', "different values of text for a"),
    ],
)
def test_a_joined_file_that_cannot_be_used_is_one_line(content: str | None, why: str, tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=why) as refused:
        read_joined(path, "text")
    assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match=r"there is no file|is not a Parquet file"):
        read_joined(path.rename(tmp_path / "l.parquet") if content is not None else tmp_path / "n.parquet", "text")
