"""Tests of the synthetic fixture: its schema, size and bytes, and that it contains every irregularity it names."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hyperagent.data.files.schema import PARAMETER_NAMES, TRAJECTORY_SCHEMA
from hyperagent.data.fixture.generate import write_fixture
from hyperagent.data.fixture.parts import FixtureCase
from hyperagent.errors import StorageError

Rows = dict[str, dict[str, Any]]

MAX_BYTES = 200_000
MARKS = ("</parameter>", "<|im_end|>", "<|im_start|>assistant", "<tool_call>", "</tool_response>", "\r\n")
TRAPS = {
    "hostile": MARKS,
    "control-characters": ("\x00", "\x01", "\x08", "\x0b", "\x0c", "\x1b", "\x1f", "\x7f", "\x85", "\u2028", "\u2029"),
    "rare-characters": ("\U0001f9d1\u200d\U0001f4bb", "\U00020bb7", "Z\u0351\u036b", "e\u0301", "\u202e", "\ufeff"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fixture")


@pytest.fixture(scope="module")
def cases(folder: Path) -> tuple[FixtureCase, ...]:
    return write_fixture(folder / "f.parquet")


@pytest.fixture(scope="module")
def rows(folder: Path, cases: tuple[FixtureCase, ...]) -> Rows:
    """Return the rows read from the file by id without `fixture-`; the row without an id has the key `None`."""
    table = pq.read_table(folder / "f.parquet").to_pylist()
    return {str(row["trajectory_id"]).removeprefix("fixture-"): row for row in table}


@pytest.fixture(scope="module")
def line_cases(folder: Path) -> tuple[FixtureCase, ...]:
    return write_fixture(folder / "f.jsonl")


@pytest.fixture(scope="module")
def lines(folder: Path, line_cases: tuple[FixtureCase, ...]) -> list[bytes]:
    return (folder / "f.jsonl").read_bytes().removesuffix(b"\n").split(b"\n")


def of_role(row: dict[str, Any], role: str) -> list[dict[str, Any]]:
    return [message for message in row["trajectory"] or [] if message["role"] == role]


def calls(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [call for message in row["trajectory"] or [] for call in message["tool_calls"] or []]


def arguments(row: dict[str, Any]) -> list[str | None]:
    return [call["function"]["arguments"] for call in calls(row)]


def test_the_file_has_the_exact_schema_in_several_row_groups(folder: Path, cases: tuple[FixtureCase, ...]) -> None:
    path = folder / "f.parquet"
    assert pq.read_schema(path).equals(TRAJECTORY_SCHEMA)
    assert path.stat().st_size < MAX_BYTES
    metadata = pq.ParquetFile(path).metadata
    assert metadata.num_row_groups >= 4
    assert metadata.num_rows == len(cases)
    assert metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_the_seed_gives_the_bytes(name: str, tmp_path: Path) -> None:
    again = [write_fixture(tmp_path / folder / name, seed=3) for folder in ("one", "two")]
    assert again[0] == again[1]
    one = (tmp_path / "one" / name).read_bytes()
    assert one == (tmp_path / "two" / name).read_bytes()
    other = write_fixture(tmp_path / name, seed=4)
    assert one != (tmp_path / name).read_bytes()
    assert [case.shows for case in other] == [case.shows for case in again[0]]


@pytest.mark.parametrize("seed", range(5))
def test_no_seed_makes_the_file_large(seed: int, tmp_path: Path) -> None:
    write_fixture(tmp_path / "a.parquet", seed=seed)
    assert (tmp_path / "a.parquet").stat().st_size < MAX_BYTES


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"could not write .*a\.parquet") as refused:
        write_fixture(tmp_path / "file" / "a.parquet")
    assert "\n" not in str(refused.value)


def test_cases_stand_in_the_order_of_the_file(
    folder: Path, cases: tuple[FixtureCase, ...], line_cases: tuple[FixtureCase, ...], lines: list[bytes]
) -> None:
    ids = pq.read_table(folder / "f.parquet", columns=["trajectory_id"])["trajectory_id"].to_pylist()
    assert [case.trajectory_id for case in cases] == ids
    assert line_cases[: len(cases)] == cases
    assert len(line_cases) == len(lines) > len(cases)
    for line, case in zip(lines, line_cases, strict=True):
        if case.trajectory_id:
            assert json.loads(line)["trajectory_id"] == case.trajectory_id
    named = [case.trajectory_id for case in line_cases if case.trajectory_id]
    assert len(named) == len(set(named))
    assert all(case.trajectory_id for case in cases)
    assert all(case.shows and case.refusal != "" for case in line_cases)


def test_every_tool_is_padded_with_the_parameters_of_all(rows: Rows) -> None:
    tools = [tool for row in rows.values() for tool in row["tools"] or []]
    assert {tool["function"]["name"] for tool in tools} == {
        "execute_bash",
        "str_replace_editor",
        "think",
        "task_tracker",
        "finish",
    }
    for tool in tools:
        properties = tool["function"]["parameters"]["properties"]
        assert tuple(properties) == PARAMETER_NAMES
        own = {name for name, value in properties.items() if value is not None}
        assert set(tool["function"]["parameters"]["required"]) <= own
        assert 0 < len(own) < len(PARAMETER_NAMES)
    # Every parameter belongs to a tool, and padding also occurs below the first level.
    assert all(any(tool["function"]["parameters"]["properties"][name] for tool in tools) for name in PARAMETER_NAMES)
    assert tools[0]["function"]["parameters"]["properties"]["command"]["enum"] is None


def test_json_lines_have_the_padding_and_the_fields_of_arrow(lines: list[bytes], rows: Rows) -> None:
    for line, row in zip(lines, rows.values(), strict=False):
        assert json.loads(line) == row


def test_outcomes(rows: Rows) -> None:
    assert (rows["plain"]["resolved"], rows["unresolved"]["resolved"]) == (1, 0)
    assert rows["max-iteration"]["exit_status"] == (
        "RuntimeError: Agent reached maximum iteration. Current iteration: 100, max iteration: 100"
    )
    assert {row["exit_status"] for name, row in rows.items() if name != "max-iteration"} == {"submit"}
    for column in ("gen_tests_correct", "pred_passes_gen_tests"):
        assert {row[column] for row in rows.values()} == {None, 0.0, 1.0}
    last = rows["finish"]["trajectory"][-1]
    assert [call["function"]["name"] for call in last["tool_calls"]] == ["finish"]
    assert rows["max-iteration"]["trajectory"][-1]["role"] == "tool"


def test_repositories_attempts_and_forks(rows: Rows) -> None:
    assert len({row["repo"] for row in rows.values()} - {None}) >= 5
    assert all(re.fullmatch(r"[\w.-]+__[\w.-]+-\d+", row["instance_id"]) for row in rows.values())
    one, other = rows["attempt-1"], rows["attempt-2"]
    assert (one["repo"], one["instance_id"]) == (other["repo"], other["instance_id"])
    assert one["trajectory"] != other["trajectory"]
    source, fork = rows["original"], rows["fork"]
    assert source["repo"] != fork["repo"]
    assert source["instance_id"] == fork["instance_id"]
    # These two are the only duplicates: every other issue occurs in one repository only.
    repos = defaultdict(set)
    for row in rows.values():
        for issue in re.findall(r"<issue_description>(.*?)</issue_description>", str(row["trajectory"]), re.DOTALL):
            repos[issue].add(row["repo"])
    assert [found for found in repos.values() if len(found) > 1] == [{source["repo"], fork["repo"]}]


def test_tasks_have_the_layout_of_openhands(rows: Rows) -> None:
    task = of_role(rows["plain"], "user")[0]["content"]
    name = rows["plain"]["repo"].split("/")[1]
    assert task.startswith(f"<uploaded_files>\n/workspace/{name}\n</uploaded_files>\n")
    assert re.search(r"\n<issue_description>\n.+\n</issue_description>\n", task, re.DOTALL)


def test_shapes_of_dialogues(rows: Rows) -> None:
    assert [message["role"] for message in rows["plain"]["trajectory"]][:4] == ["system", "user", "assistant", "tool"]
    assert not of_role(rows["no-system"], "system")
    assert rows["tools-null"]["tools"] is None
    assert rows["tools-empty"]["tools"] == []
    assert [message["role"] for message in rows["two-users"]["trajectory"]][:3] == ["system", "user", "user"]
    roles = "".join(message["role"][0] for message in rows["user-again"]["trajectory"])
    assert re.search("a.*u.*a", roles.removeprefix("su"))


def test_contents_and_calls(rows: Rows) -> None:
    for name, content in (("null", None), ("empty", "")):
        message = of_role(rows[f"call-content-{name}"], "assistant")[0]
        assert message["content"] == content
        assert message["tool_calls"]
    both = of_role(rows["call-content-text"], "assistant")[0]
    assert both["content"]
    assert both["tool_calls"]
    silent = of_role(rows["content-null"], "assistant")[0]
    assert (silent["content"], silent["tool_calls"]) == (None, None)
    assert of_role(rows["result-null"], "tool")[0]["content"] is None
    empties = [message for message in rows["tool-calls-empty"]["trajectory"] if message["tool_calls"] == []]
    assert {message["role"] for message in empties} == {"tool", "assistant"}
    assert all(text["content"][0] == "\n" for text in of_role(rows["content-starts-with-newlines"], "assistant"))
    assert all(text["content"][-1] == "\n" for text in of_role(rows["content-ends-with-white-space"], "assistant"))


def test_results_name_their_calls(rows: Rows) -> None:
    counts = [len(message["tool_calls"] or []) for message in rows["parallel-calls"]["trajectory"]]
    assert counts == [0, 0, 3, 0, 0, 0, 2, 0, 0, 0]
    for name, row in rows.items():
        made = [(call["id"], call["function"]["name"]) for call in calls(row)]
        answered = [(message["tool_call_id"], message["name"]) for message in of_role(row, "tool")]
        assert answered == made[: len(answered)]
        assert len(made) - len(answered) == (name == "finish")
        assert len(set(made)) == len(made)


def test_arguments(rows: Rows) -> None:
    assert arguments(rows["arguments-empty"]) == ["{}"]
    assert arguments(rows["arguments-null"]) == [None]
    nested = json.loads(arguments(rows["arguments-nested"])[0] or "")
    assert {type(value) for value in nested.values()} == {str, list, int, float, type(None), bool}
    assert isinstance(nested["task_list"][0], dict)
    assert json.loads(arguments(rows["arguments-list"])[0] or "") == ["ls"]
    assert json.loads(arguments(rows["arguments-string"])[0] or "") == "ls"
    assert arguments(rows["arguments-nan"]) == ['{"timeout": NaN}']
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments(rows["arguments-not-json"])[0] or "")
    assert [call["function"]["name"] for call in calls(rows["call-without-name"])] == [None]
    assert {"<|im_end|", "</parameter>"} < set(json.loads(arguments(rows["hostile-argument-name"])[0] or ""))


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_stand_wherever_a_row_has_text(trap: str, rows: Rows) -> None:
    first = json.loads(arguments(rows[f"{trap}-arguments"])[0] or "")["command"]
    texts = {
        "arguments": first,
        "output": of_role(rows[f"{trap}-output"], "tool")[0]["content"],
        "task": of_role(rows[f"{trap}-task"], "user")[0]["content"],
        "system": of_role(rows[f"{trap}-system"], "system")[0]["content"],
        "answer": of_role(rows[f"{trap}-answer"], "assistant")[-1]["content"],
    }
    for place, text in texts.items():
        missing = [mark for mark in TRAPS[trap] if mark not in text]
        assert not missing, f"{place} lacks {missing}"


def test_texts_end_in_partial_control_tokens(rows: Rows) -> None:
    ends = set()
    for name, row in rows.items():
        if name.startswith("partial-token"):
            texts = [message["content"] for message in row["trajectory"][2:]]
            ends.add(texts[0].rpartition(" ")[2])
            assert len({text.rpartition(" ")[2] for text in texts}) == 1
            assert of_role(row, "user")[-1]["content"] == texts[0]
    assert {"<|im_end", "<|im_", "<|im_start|"} <= ends


def test_large_texts(rows: Rows) -> None:
    assert len(of_role(rows["long-output"], "tool")[0]["content"]) >= 200 * 1024
    assert re.fullmatch(r"\w{20000,}", of_role(rows["long-word"], "tool")[0]["content"])
    assert len(of_role(rows["oversized-output"], "tool")[0]["content"]) > 4 * 1024 * 1024


def test_rows_to_refuse(rows: Rows, cases: tuple[FixtureCase, ...]) -> None:
    assert rows["empty"]["trajectory"] == []
    assert rows["null"]["trajectory"] is None
    assert not of_role(rows["no-assistant"], "assistant")
    assert rows["assistant-first"]["trajectory"][0]["role"] == "assistant"
    assert all(not message["content"].strip() for message in of_role(rows["blank-task"], "user"))
    assert of_role(rows["unknown-role"], "narrator")
    refused = {str(case.trajectory_id).removeprefix("fixture-") for case in cases if case.refusal}
    wrong = {"arguments-not-json", "arguments-nan", "arguments-list", "arguments-string", "call-without-name"}
    whole = {"empty", "null", "no-assistant", "assistant-first", "blank-task", "unknown-role"}
    assert refused == wrong | whole | {"oversized-output"}


def test_what_only_json_lines_can_hold(lines: list[bytes], cases: tuple[FixtureCase, ...]) -> None:
    broken, a_list, *rest = (line for line in lines[len(cases) :] if b"fixture-none-on" not in line)
    with pytest.raises(json.JSONDecodeError):
        json.loads(broken)
    assert isinstance(json.loads(a_list), list)
    for line, role in zip(lines[len(cases) :], ("tool", "assistant"), strict=False):
        assert [message["tool_calls"] for message in of_role(json.loads(line), role)][:1] == ["None"]
    row = {found["trajectory_id"].removeprefix("fixture-"): found for found in map(json.loads, rest)}
    assert isinstance(row["repo-number"]["repo"], int)
    assert isinstance(row["trajectory-text"]["trajectory"], str)
    assert isinstance(of_role(row["content-image"], "assistant")[0]["content"], list)
    assert "x" in row["message-text"]["trajectory"]
    half = of_role(row["half-surrogate"], "assistant")[0]["content"]
    assert b"\\ud800" in rest[-1]
    with pytest.raises(UnicodeEncodeError):
        half.encode()
