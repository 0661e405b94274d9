"""Tests of extra texts made from earlier trajectories: never of the same or a later issue, and of bounded length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import call, dialogue, row, write_parquet
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.reader import read_rows
from hyperagent.data.pipeline.condensed import condensed
from hyperagent.data.pipeline.earlier_texts import EarlierSettings, earlier_rows, write_earlier_texts
from hyperagent.data.pipeline.selection import RowFacts, Selection
from hyperagent.data.pipeline.split import SplitSettings
from hyperagent.data.pipeline.tokenize_dataset import JoinedFiles, TokenizeSettings, tokenize_file
from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.errors import DataError


def attempt(number: int, repo: str, issue: str, instance: str, *, resolved: int = 0) -> dict[str, Any]:
    return row(
        {"role": "user", "content": f"<issue_description>{issue}</issue_description>"},
        {"role": "assistant", "content": "let me", "tool_calls": [call("bash", f'{{"command": "cat of-{number}"}}')]},
        {"role": "tool", "content": "secret output"},
        {"role": "assistant", "content": f"done with {number}"},
        tools=[],
        trajectory_id=f"t{number}",
        instance_id=instance,
        repo=repo,
        resolved=resolved,
    )


def written(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, dict[str, Any]]:
    source = write_parquet(tmp_path / "d.parquet", rows)
    write_earlier_texts(source, tmp_path / "e.jsonl", EarlierSettings(**settings))
    lines = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    return {line["instance_id"]: line for line in lines}


ROWS = [
    attempt(0, "a/x", "third", "a__x-30"),
    attempt(1, "a/x", "first", "a__x-4"),
    attempt(2, "a/x", "second", "a__x-12"),
    attempt(3, "a/x", "second", "a__x-12", resolved=1),
    attempt(4, "a/y", "only", "a__y-1"),
    attempt(5, "a/z", "later in the file", "a__z-main"),
    attempt(6, "a/z", "last in the file", "a__z-2"),
]


def test_a_text_holds_the_latest_earlier_issue_that_was_solved(tmp_path: Path) -> None:
    found = written(tmp_path, ROWS)
    # By number 4 < 12 < 30; of the two attempts at 12 the one that solved it; a__z has an id without number.
    assert {name: line["sources"] for name, line in found.items()} == {
        "a__x-30": ["a__x-12"],
        "a__x-12": ["a__x-4"],
        "a__z-2": ["a__z-main"],
    }
    assert found["a__x-30"]["text"] == ("Earlier issue: second\n\nSteps:\nbash cat of-3\n\nFinal message: done with 3")


def test_several_trajectories_come_in_order_and_without_tool_outputs(tmp_path: Path) -> None:
    found = written(tmp_path, ROWS, trajectories=2)
    assert found["a__x-30"]["sources"] == ["a__x-4", "a__x-12"]
    text = found["a__x-30"]["text"]
    assert text.index("done with 1") < text.index("done with 3")
    assert "secret" not in text
    assert "let me" not in text


def test_the_report_names_tasks_without_an_earlier_one_and_tokenizing_refuses_them(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    source, out = write_parquet(tmp_path / "d.parquet", ROWS), tmp_path / "e.jsonl"
    report = write_earlier_texts(source, out, EarlierSettings())
    assert (report.texts, report.trajectories, report.without_instance) == (3, 3, 0)
    assert set(report.without_earlier) == {"a__x-4", "a__y-1", "a__z-main"}
    assert report.characters == sum(len(json.loads(line)["text"]) for line in out.read_text().splitlines())
    settings = TokenizeSettings(
        views=ViewSettings(condition=("task", "extra")), split=SplitSettings(held_out_share=0.3)
    )
    tokenized = tokenize_file(source, tmp_path / "t", tokenizer, settings, joined=JoinedFiles(extra=out))
    assert {refusal.trajectory_id for refusal in tokenized.refused} == {"t1", "t4", "t5"}
    assert {refusal.reason for refusal in tokenized.refused} == {"it has no extra text, which the condition requires"}
    # A sample is drawn from the four rows that have a text, none of which is refused.
    sampled = settings.model_copy(update={"selection": Selection(sample=4)})
    tokenized = tokenize_file(source, tmp_path / "s", tokenizer, sampled, joined=JoinedFiles(extra=out))
    assert (tokenized.refused, dict(tokenized.left_out)) == ((), {"no extra text": 3})


def facts(rows: list[tuple[int, int, int]]) -> list[RowFacts]:
    """Return facts of (repository, issue number, issue text) triples."""
    return [
        RowFacts(number, f"t{number}", f"a/{repo}", f"a{text % 2}__{repo}-{issue}", False, "", bytes([repo, text]))
        for number, (repo, issue, text) in enumerate(rows)
    ]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 6)), max_size=25), st.integers(1, 8))
def test_no_text_holds_the_same_issue_or_a_later_one(rows: list[tuple[int, int, int]], limit: int) -> None:
    everything = facts(rows)
    found = earlier_rows(everything, trajectories=limit)
    assert set(found) == {fact.instance_id for fact in everything}
    for instance, sources in found.items():
        own = [fact for fact in everything if fact.instance_id == instance]
        number = int(instance.rpartition("-")[2])
        assert len(sources) <= limit
        assert len({source.issue for source in sources}) == len(sources)
        for source in sources:
            assert source.repo == own[0].repo
            assert source.issue not in {fact.issue for fact in own}
            assert int(source.instance_id.rpartition("-")[2]) < number
            # Nor does the issue occur again at or after this one.
            assert all(int(f.instance_id.rpartition("-")[2]) < number for f in everything if f.issue == source.issue)
        past = {
            issue
            for issue in {fact.issue for fact in everything if fact.repo == own[0].repo}
            if max(int(f.instance_id.rpartition("-")[2]) for f in everything if f.issue == issue) < number
        }
        assert len(sources) == min(limit, len(past))


@given(st.integers(200, 3000), st.integers(0, 60), st.text(max_size=400), st.text(max_size=400))
def test_a_condensed_trajectory_stays_within_its_limit(limit: int, steps: int, task: str, ending: str) -> None:
    commands = [f'{{"command": "step {n} {"x" * (7 * n)}"}}' for n in range(steps)]
    messages = [{"role": "assistant", "content": "", "tool_calls": [call("bash", command)]} for command in commands]
    text = condensed(
        dialogue(
            {"role": "user", "content": f"go {task}"}, *messages, {"role": "assistant", "content": f"end {ending}"}
        ),
        max_characters=limit,
    )
    assert len(text) <= limit
    assert text.startswith("Earlier issue: go")
    assert "Final message: end" in text


def test_the_first_and_the_last_steps_stay() -> None:
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call("bash", f'{{"command": "step {n:02d}\\nmore"}}')]}
        for n in range(50)
    ]
    text = condensed(
        dialogue({"role": "user", "content": "go"}, *messages, {"role": "assistant", "content": "end"}),
        max_characters=200,
    )
    lines = text.split("Steps:\n")[1].split("\n\nFinal")[0].splitlines()
    gap = lines.index("(…)")
    assert lines[:gap] == [f"bash step {n:02d} more" for n in range(gap)]
    assert lines[gap + 1 :] == [f"bash step {n:02d} more" for n in range(50 - (len(lines) - gap - 1), 50)]
    assert abs(gap - (len(lines) - gap - 1)) <= 1
    assert gap > 1


def test_what_cannot_be_used_is_one_error(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "d.parquet", [ROWS[1], ROWS[4]])
    with pytest.raises(DataError, match=r"no task of .* has an earlier one"):
        write_earlier_texts(source, tmp_path / "e.jsonl", EarlierSettings())
    with pytest.raises(DataError, match=r"choose a name that ends in \.jsonl"):
        write_earlier_texts(source, tmp_path / "e.json", EarlierSettings())
    twice = write_parquet(tmp_path / "twice.parquet", [ROWS[1], attempt(9, "b/x", "first elsewhere", "a__x-4")])
    with pytest.raises(DataError, match="a__x-4 is in two repositories, a/x and b/x"):
        write_earlier_texts(twice, tmp_path / "e.jsonl", EarlierSettings())
    assert not (tmp_path / "e.jsonl").exists()
    with pytest.raises(ValidationError, match="8 earlier trajectories need 1600 characters"):
        EarlierSettings(trajectories=8, max_characters=1599)


def test_real_trajectories(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "trajectories" / "dev.parquet"
    report = write_earlier_texts(source, tmp_path / "e.jsonl", EarlierSettings(trajectories=8))
    assert (report.texts, len(report.without_earlier), report.refused) == (145, 42, ())
    repos = {data["instance_id"]: data["repo"] for data in read_rows(source)}
    for line in map(json.loads, (tmp_path / "e.jsonl").read_text().splitlines()):
        assert len(line["text"]) <= 16_000
        assert {repos[source] for source in line["sources"]} == {repos[line["instance_id"]]}
        assert line["instance_id"] not in line["sources"]
