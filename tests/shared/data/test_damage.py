"""Tests of damaged, unusual or sparse data files: each is refused in one line, or read correctly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_identity import data_identity

from hyperagent.data.chat.messages import dialogue_of
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.reader import count_rows, read_rows
from hyperagent.data.files.tokens_file import HELD_OUT, TRAIN, TokenizedTrajectory, read_tokens, write_tokens
from hyperagent.data.pipeline.tokenize_dataset import TokenizeReport, TokenizeSettings, tokenize_file
from hyperagent.data.pipeline.views import ViewMaker, ViewSettings
from hyperagent.data.reports.inspect import inspect_file
from hyperagent.errors import DataError, RowRefused


def table(*, count: int = 6, **columns: Any) -> pa.Table:
    messages = [
        [
            {"role": "user", "content": f"run test {number}", "tool_calls": None},
            {"role": "assistant", "content": "the cat sat", "tool_calls": None},
        ]
        for number in range(count)
    ]
    whole = {
        "trajectory_id": [f"t{number}" for number in range(count)],
        "repo": [f"a/{number % 3}" for number in range(count)],
        "trajectory": messages,
        "tools": [[]] * count,
    }
    return pa.table({**whole, **columns})


def write(path: Path, content: pa.Table) -> Path:
    pq.write_table(content, path)
    return path


def tokenize(source: Path, tokenizer: ChatTokenizer) -> TokenizeReport:
    settings = TokenizeSettings(views=ViewSettings(max_tokens=1000, max_prompt_tokens=100))
    return tokenize_file(source, source.with_suffix(".tokens"), tokenizer, settings)


@pytest.mark.parametrize("tools", [[None] * 6, [[]] * 6])
def test_no_row_with_tools_is_no_fault(tools: list[Any], tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    report = tokenize(write(tmp_path / "d.parquet", table(tools=tools)), tokenizer)
    assert (sum(report.splits.values()), report.refused) == (6, ())


def test_strings_and_lists_with_wide_offsets_are_read(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    call = pa.struct([("function", pa.struct([("name", pa.large_string()), ("arguments", pa.large_string())]))])
    message = pa.struct(
        [("role", pa.large_string()), ("content", pa.large_string()), ("tool_calls", pa.large_list(call))]
    )
    wide = table().cast(
        pa.schema(
            [
                ("trajectory_id", pa.large_string()),
                ("repo", pa.large_string()),
                ("trajectory", pa.large_list(message)),
                ("tools", pa.large_list(pa.null())),
            ]
        )
    )
    one = tokenize(write(tmp_path / "wide.parquet", wide), tokenizer)
    other = tokenize(write(tmp_path / "narrow.parquet", table()), tokenizer)
    assert (one.tokens, one.splits, one.refused) == (other.tokens, other.splits, ())


@pytest.mark.parametrize(
    ("columns", "difference", "reason"),
    [
        ({"repo": [7] * 6}, "repo is integer, not string", "its repo is 7, not text"),
        (
            {"trajectory_id": [0.5 + n for n in range(6)]},
            "trajectory_id is float",
            "its trajectory_id is 0.5, not text",
        ),
        ({"tools": ["bash"] * 6}, "tools is string, not list", "its tools is 'bash', not a list"),
        ({"trajectory": ["hello"] * 6}, "trajectory is string, not list", "its trajectory is 'hello', not a list"),
        ({"trajectory": [["hello"]] * 6}, "trajectory is string, not struct", "message 0 is 'hello', not an object"),
        (
            {"trajectory": [[{"role": "user", "content": [{"url": "x"}], "tool_calls": None}]] * 6},
            "trajectory.content is list, not string",
            "message 0 has a part of the type None; only text can be read",
        ),
    ],
)
def test_a_column_of_another_type_is_named_and_its_rows_refused_one_by_one(
    columns: dict[str, Any], difference: str, reason: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "d.parquet", table(**columns))
    report = inspect_file(path, tokenizer)
    assert any(difference in line for line in report.schema_differences)
    names = [f"row {n}" if "trajectory_id" in columns else f"t{n}" for n in range(6)]
    assert [refusal.trajectory_id for refusal in report.refused] == names
    assert report.refused[0].reason == reason
    with pytest.raises(DataError, match=re.escape(reason)):
        tokenize(path, tokenizer)
    with pytest.raises(RowRefused, match=re.escape(reason)):
        inspect_file(path, tokenizer, strict=True)


def test_rows_without_a_name_or_a_repository_get_one(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    names = [None, *(f"t{number}" for number in range(1, 20))]
    repos = [f"a/{number}" for number in range(20)]
    repos[1], repos[4] = None, ""  # type: ignore[call-overload]
    messages = [
        [{"role": "user", "content": f"task {n}"}, {"role": "assistant", "content": "the cat sat"}] for n in range(20)
    ]
    content = table(count=20, trajectory_id=names, repo=repos, trajectory=messages)
    report = tokenize(write(tmp_path / "d.parquet", content), tokenizer)
    assert report.refused == ()
    assert sum(report.splits.values()) == 20


def test_half_a_surrogate_pair_refuses_its_row(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = table().to_pylist()
    rows[2]["trajectory"][0]["content"] = "task \ud83d"
    rows[3]["trajectory"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = tokenize(path, tokenizer)
    assert [refusal.trajectory_id for refusal in report.refused] == ["t2", "t3"]
    assert all("half of a surrogate pair" in refusal.reason for refusal in report.refused)


def test_a_call_without_arguments_is_shown(tokenizer: ChatTokenizer) -> None:
    row = table(count=1).to_pylist()[0]
    row["trajectory"][1]["tool_calls"] = [{"function": {"name": "stop", "arguments": None}}]
    masked = ViewMaker(tokenizer).masked(dialogue_of(row))
    assert "<call stop></call>" in tokenizer.decode(masked.ids.tolist())


def cut_in_the_middle(path: Path) -> None:
    """Overwrite the data pages but not the footer, as a failing disk may do."""
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = bytes(len(content) - footer - 4)
    path.write_bytes(content)


def test_a_data_file_damaged_behind_its_footer_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", table())
    cut_in_the_middle(path)
    assert count_rows(path) == 6
    with pytest.raises(DataError, match=r"d\.parquet is damaged: .*; copy it again") as refused:
        list(read_rows(path))
    assert "\n" not in str(refused.value)


def trajectories(count: int = 8, *, length: int = 500) -> list[TokenizedTrajectory]:
    random = np.random.default_rng(0)
    return [
        TokenizedTrajectory(
            trajectory_id=f"t{number}",
            repo=f"a/{number}",
            split=TRAIN if number else HELD_OUT,
            token_ids=random.integers(0, 2**31, length, dtype=np.uint32),
            positions=np.arange(1, length, 2, dtype=np.uint32),
            prompt_ids=random.integers(0, 2**31, 9, dtype=np.uint32),
            student_ids=np.empty(0, np.uint32),
            student_positions=np.empty(0, np.uint32),
        )
        for number in range(count)
    ]


def write_all(path: Path, written: list[TokenizedTrajectory], tokenizer: ChatTokenizer) -> None:
    """Write a tokens file with every trajectory in the full view."""
    with write_tokens(path, data_identity(tokenizer.identity)) as writer:
        for one in written:
            writer.write(replace(one, student_ids=one.token_ids, student_positions=one.positions))


def test_damaged_tokens_are_not_read_as_tokens(
    tokenizer: ChatTokenizer, flip_byte: Callable[[Path, int], None], tmp_path: Path
) -> None:
    """A page's checksum covers the ids; truncated pages and a damaged footer are detected by other checks."""
    path = tmp_path / "t.tokens"
    written = trajectories(2, length=2000)
    write_all(path, written, tokenizer)
    whole = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(3)
    assert column.path_in_schema.startswith("token_ids")
    end = column.dictionary_page_offset + column.total_compressed_size
    for index in range(end - 4000, end, 97):
        path.write_bytes(whole)
        flip_byte(path, index)
        with pytest.raises(DataError, match=r"is damaged: .*; tokenize the data again"):
            list(read_tokens(path))
    for index in range(len(whole) - int.from_bytes(whole[-8:-4], "little") - 8, len(whole), 5):
        path.write_bytes(whole)
        flip_byte(path, index)
        try:
            assert len(list(read_tokens(path))) == len(written)
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_a_cut_tokens_file_is_one_line(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.tokens"
    write_all(path, trajectories(), tokenizer)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="is not a Parquet file") as refused:
        list(read_tokens(path))
    assert "\n" not in str(refused.value)


def test_one_split_of_a_tokens_file(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    write_all(tmp_path / "t.tokens", trajectories(), tokenizer)
    assert [t.trajectory_id for t in read_tokens(tmp_path / "t.tokens", split=HELD_OUT)] == ["t0"]
    assert [t.trajectory_id for t in read_tokens(tmp_path / "t.tokens", split=TRAIN)] == [f"t{n}" for n in range(1, 8)]


def test_a_full_disk_leaves_no_tokens_file(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A file size limit simulates a full disk."""
    source = write(tmp_path / "d.parquet", table(count=600, repo=[f"a/{number}" for number in range(600)]))
    program = (
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from hyperagent.data.pipeline.tokenize_dataset import TokenizeSettings, tokenize_file\n"
        "from hyperagent.data.chat.tokenizer import ChatTokenizer\n"
        "from hyperagent.errors import StorageError\n"
        "source, target, tokenizer = map(Path, sys.argv[1:])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "try: tokenize_file(source, target, ChatTokenizer(tokenizer), TokenizeSettings(), num_workers=1)\n"
        "except StorageError as error: print(json.dumps(str(error)))\n"
    )
    target = tmp_path / "out" / "t.tokens"
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(target), str(tokenizer_folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout).startswith(f"could not write {target}: ")
    assert list(target.parent.iterdir()) == []


def test_views_that_are_not_aligned_are_not_read(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.tokens"
    (one,) = trajectories(1)
    for ids, positions in ((one.token_ids[::-1], one.positions), (one.token_ids[:9], one.positions)):
        with write_tokens(path, data_identity(tokenizer.identity)) as writer:
            writer.write(replace(one, student_ids=ids, student_positions=positions))
        with pytest.raises(DataError, match=r"t\.tokens is damaged: the supervised tokens of .* differ"):
            list(read_tokens(path))
