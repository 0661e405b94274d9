"""Tests that data in other forms, under other names and with parts missing is read, or refused in one line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_rows import TOOLS, many_rows, row
from typer.testing import CliRunner

from hyperagent.cli.main import build_app
from hyperagent.data.chat.messages import dialogue_of, prune_nulls
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.columns import Columns, row_of
from hyperagent.data.files.reader import count_rows, read_rows
from hyperagent.data.files.shards import fingerprint
from hyperagent.data.pipeline.tokenize_dataset import TokenizeSettings, tokenize_file
from hyperagent.errors import ConfigError, DataError

ROWS = [
    {name: data[name] for name in ("trajectory_id", "instance_id", "repo", "trajectory", "tools")}
    for data in many_rows(6)
]
ASK: dict[str, Any] = {"role": "user", "content": "Mend it."}
DONE: dict[str, Any] = {"role": "assistant", "content": "Done."}


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(data) + "\n" for data in rows).encode()


def _zstd_stream(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("d.jsonl", lines),
        ("D.JSONL", lines),
        ("d.ndjson", lines),
        ("d.jsonl.gz", lambda rows: gzip.compress(lines(rows))),
        ("d.ndjson.ZST", lambda rows: _zstd_stream(lines(rows))),
        ("bom.jsonl", lambda rows: b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n")),
    ],
)
def test_json_lines_in_any_wrapping_are_the_same_rows(
    name: str, encode: Callable[[Any], bytes], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(encode(ROWS))
    assert count_rows(tmp_path / name) == 6
    assert [r["trajectory_id"] for r in read_rows(tmp_path / name)] == [data["trajectory_id"] for data in ROWS]
    assert [r["trajectory"] for r in read_rows(tmp_path / name)] == [data["trajectory"] for data in ROWS]


def test_a_folder_of_shards_is_one_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "README.md").write_text("Not data.")
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), folder / "train-00000-of-00003.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:1]).slice(0, 0), folder / "train-00001-of-00003.parquet")
    (folder / "train-00002-of-00003.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[3:])))
    assert count_rows(folder) == 6
    assert [r["trajectory_id"] for r in read_rows(folder)] == [data["trajectory_id"] for data in ROWS]
    before = fingerprint(folder)
    (folder / "train-00003.jsonl").write_bytes(b"\n")
    assert fingerprint(folder) != before
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \*\.parquet, \*\.jsonl or \*\.ndjson"):
        count_rows(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("d.jsonl", lines(ROWS).decode().encode("utf-16"), "is UTF-16; convert it: iconv"),
        ("d.json", json.dumps(ROWS).encode(), r"becomes JSON Lines with `jq -c"),
        ("d.jsonl.gz", gzip.compress(lines(ROWS))[:-30], "is damaged: .*; copy it again"),
        ("d.jsonl.gz", b"no gzip", "is damaged: .*; copy it again"),
        ("d.jsonl.zst", b"no zstd at all", "check the path|is damaged"),
    ],
)
def test_what_cannot_be_read_is_one_right_line(name: str, content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=why) as refused:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(refused.value)


def test_only_the_columns_that_are_used_are_read(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    broken = pa.Array.from_buffers(pa.string(), 6, pa.array([b"\xff\xfe"] * 6, pa.binary()).buffers())
    pq.write_table(table.append_column("model_patch", broken), tmp_path / "d.parquet")
    assert len(list(read_rows(tmp_path / "d.parquet"))) == 6


MESSAGES = [ASK, DONE]


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": MESSAGES, "tools": TOOLS},
        {"messages": json.dumps(MESSAGES), "tools": json.dumps(TOOLS)},
        {"conversations": [{"from": "human", "value": "Mend it."}, {"from": "gpt", "value": "Done."}], "tools": TOOLS},
        {"trajectory": [{"role": "user", "text": "Mend it."}, {"role": "ai", "text": "Done."}], "tools": TOOLS},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Mend "}, {"type": "text", "text": "it."}]}, DONE],
         "tools": TOOLS},
    ],
)  # fmt: skip
def test_messages_under_other_names_are_the_same_conversation(raw: dict[str, Any]) -> None:
    found = dialogue_of(row_of(raw, Columns().sources(raw, Path("d"))))
    assert (found.messages, found.tools, found.not_read) == (MESSAGES, prune_nulls(TOOLS), frozenset())


def test_older_forms_of_messages() -> None:
    named = {"name": "run", "arguments": '{"command": "ls"}'}
    raw = [{"role": "developer", "content": "You mend code."}, ASK, {"role": "assistant", "content": None, "function_call": named},
           {"role": "function", "name": "run", "content": "a.py"}, DONE]  # fmt: skip
    found = dialogue_of(row(*raw, tools=[]))
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.system == "You mend code."
    assert found.messages[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "run", "arguments": {"command": "ls"}}}
    ]


@pytest.mark.parametrize(
    ("instance_id", "repo"),
    [
        ("django__django-11099", "django/django"),
        ("Project-MONAI__MONAI-4775", "Project-MONAI/MONAI"),
        ("oauthlib__oauthlib.1fd52536.combine_file__09vlzwgc", "oauthlib/oauthlib"),
        ("something else", None),
        (None, None),
    ],
)
def test_a_missing_repository_is_read_off_the_instance_or_is_one_of_its_own(instance_id: Any, repo: str | None) -> None:
    raw = {"messages": MESSAGES, "instance_id": instance_id}
    found = row_of(raw, Columns().sources(raw, Path("d")))
    assert found["trajectory_id"].startswith("made-")
    assert found["repo"] == (repo or f"no-repository/{found['trajectory_id']}")
    # An id made of the content is the same every time, and another for other content.
    assert row_of(dict(reversed(raw.items())), Columns().sources(raw, Path("d"))) == found
    other = {**raw, "messages": [ASK, {**DONE, "content": "Not yet."}]}
    assert row_of(other, Columns().sources(other, Path("d")))["trajectory_id"] != found["trajectory_id"]


def test_a_file_beside_the_data_names_its_columns(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_bytes(lines([{"chat": MESSAGES, "run": 7, "project": "a/b"}]))
    with pytest.raises(
        DataError, match=r"has no column with messages: it has chat, run, project, .*d\.jsonl\.columns\.yaml"
    ):
        dialogue_of(next(read_rows(source)))
    before = fingerprint(source)
    names = tmp_path / "d.jsonl.columns.yaml"
    names.write_text("trajectory: chat\ntrajectory_id: run\nrepo: project\n")
    found = next(read_rows(source))
    assert (found["trajectory_id"], found["repo"], found["trajectory"]) == ("7", "a/b", MESSAGES)
    assert fingerprint(source) != before
    names.write_text("trajectory: talk\n")
    with pytest.raises(DataError, match="has no column 'talk' for trajectory; it has chat, run, project"):
        next(read_rows(source))
    names.write_text("trajectory: chat\ntrajectory: talk\n")
    with pytest.raises(ConfigError, match="the key 'trajectory' occurs twice"):
        next(read_rows(source))


def test_rows_without_tools_ids_and_repositories_are_tokenized(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = [{"messages": [{**ASK, "content": f"Mend part {n}."}, DONE]} for n in range(6)]
    (tmp_path / "d.jsonl").write_bytes(lines(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = [
        tokenize_file(tmp_path / name, tmp_path / f"{name}.tokens", tokenizer, TokenizeSettings())
        for name in ("d.jsonl", "d.parquet")
    ]
    assert found[0].refused == found[1].refused == ()
    assert found[0].tokens == found[1].tokens


def test_inspecting_a_file_of_which_nothing_is_usable_fails_and_groups_the_reasons(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines([{"messages": [ASK]}] * 5 + [{"talk": 1}]))
    done = CliRunner().invoke(
        build_app(), ["data", "inspect", str(tmp_path / "d.jsonl"), "--tokenizer", str(tokenizer.folder)]
    )
    assert done.exit_code == 1
    text = " ".join(done.output.split())
    assert "5 rows, such as trajectory 'made-" in text
    assert "it has no assistant message" in text
    assert "has no column with messages: it has talk" in text
