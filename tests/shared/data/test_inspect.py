"""Tests of `inspect` on every irregular row of the fixture, and on real trajectories of several agent frameworks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_rows import LAST, SYSTEM, TOOLS, USER, dialogue, row, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.schema import TRAJECTORY_SCHEMA, schema_differences
from hyperagent.data.fixture.generate import write_fixture
from hyperagent.data.pipeline.views import ViewMaker, ViewSettings
from hyperagent.data.reports.inspect import count_phantom_parameters, inspect_file
from hyperagent.data.reports.plot import write_histogram
from hyperagent.data.reports.show import find_row, segments, show_row
from hyperagent.errors import DataError, NotFound, RowRefused


@pytest.mark.parametrize("name", ["fixture.parquet", "fixture.jsonl"])
def test_every_odd_row_is_rendered_or_refused_as_it_must_be(
    name: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    cases = write_fixture(tmp_path / name)
    report = inspect_file(tmp_path / name, tokenizer)
    assert report.schema_differences == ()
    rendered = {entry.trajectory_id: entry for entry in report.rendered}
    refused = {refusal.trajectory_id: refusal.reason for refusal in report.refused}
    assert report.rows == len(cases) == len(rendered) + len(refused)
    for number, case in enumerate(cases):
        called = case.trajectory_id or f"row {number}"
        if case.refusal is None:
            assert called in rendered, (called, case.shows, refused.get(called))
            assert rendered[called].supervised_tokens > 0
        else:
            assert case.refusal in refused[called], (called, case.shows)
    assert (report.mask_disagreements, report.phantom_parameters, report.template_mismatches) == (0, 0, 0)
    assert report.duplicates == 1
    with pytest.raises(RowRefused):
        inspect_file(tmp_path / name, tokenizer, strict=True)


@pytest.mark.slow
def test_the_real_pack_is_rendered_in_whole(real_data: Path) -> None:
    """Every row renders to the stock template's exact bytes, with independently computed token counts."""
    source = real_data / "trajectories" / "dev.parquet"
    report = inspect_file(source, ChatTokenizer(real_data / "qwen-tokenizer"))
    assert report.schema_differences == ()
    assert (report.rows, len(report.rendered), report.refused) == (271, 271, ())
    assert (report.mask_disagreements, report.phantom_parameters, report.template_mismatches) == (0, 0, 0)
    lines = [json.loads(line) for line in (real_data / "trajectories" / "manifest.jsonl").read_text().splitlines()]
    expected = {line["trajectory_id"]: line for line in lines}
    for entry in report.rendered:
        assert entry.tokens == expected[entry.trajectory_id]["tokens_qwen3coder_template"]
        assert entry.supervised_tokens > 0
        assert entry.roles["assistant"][0] == expected[entry.trajectory_id]["assistant_turns"]
    assert report.roles()["assistant"]["messages"] == sum(entry.roles["assistant"][0] for entry in report.rendered)


def test_the_schema_lock_names_what_differs() -> None:
    assert schema_differences(TRAJECTORY_SCHEMA) == []
    fields = {field.name: field for field in TRAJECTORY_SCHEMA}
    message = fields["trajectory"].type.value_type
    calls = pa.field("tool_calls", pa.list_(pa.struct([("id", pa.string())])))
    changed = pa.struct([calls if field.name == "tool_calls" else field for field in message if field.name != "name"])
    del fields["model_patch"]
    fields["resolved"] = pa.field("resolved", pa.string())
    fields["trajectory"] = pa.field("trajectory", pa.list_(changed))
    fields["more"] = pa.field("more", pa.int8())
    assert schema_differences(pa.schema(list(fields.values()))) == [
        "trajectory.name (string) is missing",
        "trajectory.tool_calls.function (struct) is missing",
        "trajectory.tool_calls.type (string) is missing",
        "model_patch (string) is missing",
        "resolved is string, not integer",
        "more is not in the schema",
    ]


def test_the_real_pack_has_the_locked_schema(real_data: Path) -> None:
    assert schema_differences(pq.read_schema(real_data / "trajectories" / "dev.parquet")) == []


def test_phantom_parameters_are_seen_in_the_rendered_text(tokenizer: ChatTokenizer) -> None:
    """Without pruning, tools keep their nulls and the template shows every padded parameter."""
    clean = dialogue(USER, LAST)
    padded = replace(clean, tools=TOOLS)  # type: ignore[arg-type]
    properties = TOOLS[0]["function"]["parameters"]["properties"]  # type: ignore[index]
    nulls = sum(declared is None for declared in properties.values())
    assert nulls == 11
    assert count_phantom_parameters(TOOLS, padded, tokenizer) == nulls  # type: ignore[arg-type]
    assert count_phantom_parameters(TOOLS, clean, tokenizer) == 0  # type: ignore[arg-type]


@given(
    st.recursive(
        st.none() | st.text(max_size=3) | st.integers(), lambda inner: st.dictionaries(st.text(max_size=3), inner)
    )
)
def test_tools_of_any_shape_are_counted(tokenizer: ChatTokenizer, shape: object) -> None:
    tool = {"function": {"name": "f", "parameters": {"properties": shape}}}
    spoken = dialogue(USER, LAST, tools=[tool])
    assert (
        count_phantom_parameters(
            [tool], replace(spoken, tools=[{"function": {"name": "f", "parameters": {}}}]), tokenizer
        )
        == 0
    )


def test_a_histogram(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "d.parquet", [row(USER, LAST)])
    write_histogram(tmp_path / "h.png", inspect_file(source, tokenizer), max_tokens=1000)
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    empty = write_parquet(tmp_path / "e.parquet", [row()])
    with pytest.raises(DataError, match="nothing to plot"):
        write_histogram(tmp_path / "e.png", inspect_file(empty, tokenizer), max_tokens=1000)
    assert not (tmp_path / "e.png").exists()


def test_a_row_is_found_by_id_or_number(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "d.parquet", [row(USER, LAST, trajectory_id=name) for name in ("a", None, "1")])
    assert [find_row(source, wanted)[0] for wanted in ("a", "0", "row 1", "1", "2")] == [0, 0, 1, 2, 2]
    with pytest.raises(NotFound, match="has no row '3'"):
        find_row(source, "3")
    lines = tmp_path / "d.jsonl"
    lines.write_text("{oops\n")
    with pytest.raises(RowRefused, match="not JSON"):
        find_row(lines, "0")


def test_segments_tell_speakers_and_mask(tokenizer: ChatTokenizer) -> None:
    data = row(SYSTEM, USER, LAST, {"role": "tool", "content": "<|im_end|>"}, LAST, tools=[])
    found = show_row(data, 0, tokenizer, settings=ViewSettings(), view="teacher", extra=None)
    assert [(segment.role, segment.supervised) for segment in found] == [
        ("system", False),
        ("user", False),
        ("assistant", False),
        ("assistant", True),
        ("assistant", False),
        ("tool", False),
        ("assistant", False),
        ("assistant", True),
        ("assistant", False),
    ]
    masked = ViewMaker(tokenizer).masked(
        dialogue(SYSTEM, USER, LAST, {"role": "tool", "content": "<|im_end|>"}, LAST, tools=[])
    )
    assert "".join(segment.text for segment in found) == masked.text
    assert [segment.first_token for segment in found[1:]] == [s.first_token + s.num_tokens for s in found[:-1]]
    assert segments(masked.ids, masked.positions, tokenizer) == found
    settings = ViewSettings(internalized=("task", "system"))
    student = show_row(data, 0, tokenizer, settings=settings, view="student", extra=None)
    assert [segment.text for segment in student[:2]] == ["<|im_start|>user\n<|im_end|>\n", "<|im_start|>assistant\n"]
    condition = show_row(data, 0, tokenizer, settings=settings, view="condition", extra=None)
    assert [(segment.role, segment.supervised) for segment in condition] == [("system", False), ("user", False)]
    with pytest.raises(RowRefused, match="t1"):
        show_row(row(), 0, tokenizer, settings=settings, view="teacher", extra=None)
