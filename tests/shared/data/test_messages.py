"""Tests of cleaning a row's messages and tools, and of refusals and their reasons."""

from __future__ import annotations

import json
from typing import Any

import pytest
from data_rows import LAST, SYSTEM, TOOLS, USER, call, dialogue, row

from hyperagent.data.chat.messages import MAX_CHARACTERS, dialogue_of, issue_text, name_of, prune_nulls, refused_as
from hyperagent.errors import DataError, RowRefused


def test_nulls_are_pruned_at_every_depth() -> None:
    assert prune_nulls({"a": None, "b": [{"c": None, "d": 0}], "e": ""}) == {"b": [{"d": 0}], "e": ""}
    (tool,) = dialogue(USER, LAST).tools
    assert tool["function"]["parameters"]["properties"] == {"command": {"type": "string"}}
    assert TOOLS[0]["function"]["parameters"]["properties"]["thought"] is None  # type: ignore[index]


@pytest.mark.parametrize("nothing", [None, "None", []])
def test_tool_calls_that_are_none(nothing: Any) -> None:
    assert dialogue(USER, {**LAST, "tool_calls": nothing}).messages == dialogue(USER, LAST).messages
    missing = row(USER, LAST)
    del missing["trajectory"][1]["tool_calls"]
    assert dialogue_of(missing).messages == dialogue(USER, LAST).messages


def test_arguments_are_parsed_in_their_order() -> None:
    arguments = '{"b": [1, 50], "a": true, "c": {"d": null}}'
    calls = [call("f", arguments), call("g", None), call("h", "{}")]
    messages = dialogue(USER, {**LAST, "content": None, "tool_calls": calls}).messages
    assert messages[1]["content"] == ""
    parsed = [entry["function"]["arguments"] for entry in messages[1]["tool_calls"]]
    assert parsed == [{"b": [1, 50], "a": True, "c": {"d": None}}, {}, {}]
    assert list(parsed[0]) == ["b", "a", "c"]


def test_the_parts_of_a_dialogue() -> None:
    whole = dialogue(SYSTEM, USER, LAST, {"role": "user", "content": "more"}, LAST)
    assert (whole.system, whole.task) == ("be good", "run the tests")
    assert dialogue(USER, LAST).system is None
    assert len(whole.first(3).messages) == 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (row(USER, LAST, trajectory_id=None), "it has no trajectory_id$"),
        (row(USER, LAST, trajectory_id="", repo=None), "it has no trajectory_id and no repo$"),
        (row(USER, LAST, repo=7), "its repo is 7, not text"),
        (row(), "it has no assistant message, so there is nothing to learn from"),
        (row(USER, LAST, trajectory=None), "it has no assistant message"),
        (row(USER), "it has no assistant message"),
        (row(LAST, USER), "its first message is the assistant's"),
        (row(USER, LAST, trajectory="[]"), "its trajectory is '\\[\\]', not a list"),
        (row(USER, LAST, trajectory=["hello"]), "message 0 is 'hello', not an object"),
        (row(USER, LAST, tools="[]"), "its tools is '\\[\\]', not a list"),
        (row(USER, LAST, tools=["bash"]), "tool 0 is 'bash', not an object"),
        (row({"role": "narrator", "content": "x"}, LAST), "message 0 has the unknown role 'narrator'"),
        (row({"role": None}, LAST), "unknown role None"),
        (
            row(USER, {**LAST, "content": [{"type": "image"}]}),
            "message 1 has a part of the type 'image'; only text can be read",
        ),
        (row(USER, {**LAST, "tool_calls": "run"}), "tool_calls of message 1 is 'run', not a list"),
        (row(USER, {**LAST, "tool_calls": [None]}), "message 1 has a tool call without a name"),
        (row(USER, {**LAST, "tool_calls": [{"function": None}]}), "message 1 has a tool call without a name"),
        (row(USER, {**LAST, "tool_calls": [call("", "{}")]}), "message 1 has a tool call without a name"),
        (row(USER, {**LAST, "tool_calls": [call("f", "{oops")]}), "message 1 calls f with arguments that are not JSON"),
        (row(USER, {**LAST, "tool_calls": [call("f", '{"a": NaN}')]}), "not JSON: NaN is not a JSON number"),
        (row(USER, {**LAST, "tool_calls": [call("f", "[1]")]}), "not a JSON object"),
        (
            row(USER, {**LAST, "content": "x" * (10 << 20)}),
            "message 1 has 10,485,760 characters, the limit is 4,194,304",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason) as refused:
        dialogue_of(data)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


def test_the_limit_counts_arguments_too() -> None:
    padding = "x" * MAX_CHARACTERS
    with pytest.raises(DataError, match="characters, the limit is"):
        dialogue(USER, {**LAST, "tool_calls": [call("f", json.dumps({"a": padding}))]})
    dialogue(USER, {**LAST, "content": padding})


@pytest.mark.parametrize("content", [None, "", "  \n"])
def test_a_task_must_say_something(content: str | None) -> None:
    with pytest.raises(DataError, match="no user message with text"):
        _ = dialogue({"role": "user", "content": content}, LAST).task


def test_a_row_is_called_by_its_id_or_its_number() -> None:
    assert name_of(row(USER, LAST), 3) == "t1"
    assert [name_of(row(trajectory_id=odd), 3) for odd in (None, "", 7)] == ["row 3"] * 3


@pytest.mark.parametrize("depth", [700, 100_000])
def test_arguments_nested_too_deeply_refuse_their_row(depth: int) -> None:
    deep = row(USER, {**LAST, "tool_calls": [call("f", '{"a":' + "[" * depth + "]" * depth + "}")]})
    with pytest.raises(RowRefused, match=r"^trajectory 't1': .*nested too deeply"), refused_as("t1"):
        prune_nulls(dialogue_of(deep).messages)


def test_two_prompts_about_one_issue_compare_equal() -> None:
    issue = "Mean of  nothing\nraises"
    here = f"<uploaded_files>\n/workspace/here\n</uploaded_files>\n<issue_description>\n{issue}\n</issue_description>"
    there = f"Consider: <pr_description>\n{issue.upper()}</pr_description> in /workspace/there"
    assert issue_text(here) == issue_text(there) == issue_text("mean of nothing raises")
    assert issue_text(here) != issue_text(f"{issue} twice")
