"""Tests of the three views of a trajectory, whose supervised tokens are identical, one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_rows import ASSISTANT, LAST, SYSTEM, TOOL, TOOLS, USER, row, views
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hyperagent.data.chat.messages import dialogue_of, prune_nulls
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.reader import read_rows
from hyperagent.data.files.tokens_file import TokenizedTrajectory
from hyperagent.data.pipeline.views import Condition, ViewMaker, ViewSettings, condition_ids
from hyperagent.errors import DataError, TooLong

WHOLE = row(SYSTEM, USER, ASSISTANT, TOOL, LAST)


def text(tokenizer: ChatTokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist())


def runs(trajectory: TokenizedTrajectory) -> list[np.ndarray]:
    """Return the runs of consecutive supervised positions."""
    return np.split(trajectory.positions, np.flatnonzero(np.diff(trajectory.positions.astype(int)) > 1) + 1)


def test_supervised_is_what_the_assistant_wrote_and_its_end_of_turn(tokenizer: ChatTokenizer) -> None:
    trajectory = views(row(USER, ASSISTANT, TOOL, LAST), tokenizer)
    written = [text(tokenizer, trajectory.token_ids[run]) for run in runs(trajectory)]
    assert written == ["the cat<call bash><command>ls</command></call><|im_end|>", "again<|im_end|>"]
    # The token before each run is the newline of the assistant's header: a position is that of the predicted token.
    for run in runs(trajectory):
        assert text(tokenizer, trajectory.token_ids[: run[0]]).endswith("<|im_start|>assistant\n")


def test_ids_equal_those_of_the_stock_tokenizer(tokenizer: ChatTokenizer, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = stock.apply_chat_template(
        dialogue_of(WHOLE).messages, tools=prune_nulls(TOOLS), tokenize=True, return_dict=True
    )["input_ids"]
    assert views(WHOLE, tokenizer).token_ids.tolist() == expected


def test_in_the_full_view_the_student_sees_what_the_teacher_sees(tokenizer: ChatTokenizer) -> None:
    trajectory = views(WHOLE, tokenizer)
    assert trajectory.student_ids is trajectory.token_ids
    assert trajectory.student_positions is trajectory.positions


@pytest.mark.parametrize(
    ("hidden", "head"),
    [
        (["system"], "<|im_start|>toolsbash command<|im_end|>\n<|im_start|>user\nrun the tests<|im_end|>\n"),
        (["tools"], "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nrun the tests<|im_end|>\n"),
        (
            ["task"],
            "<|im_start|>toolsbash command<|im_end|>\n<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\n<|im_end|>\n",
        ),
        (["task", "system", "tools"], "<|im_start|>user\n<|im_end|>\n"),
    ],
)
def test_what_is_internalized_the_student_does_not_see(hidden: list[str], head: str, tokenizer: ChatTokenizer) -> None:
    condition = ("system", "tools", "task")
    whole = views(WHOLE, tokenizer, condition=condition)
    trajectory = views(WHOLE, tokenizer, condition=condition, internalized=hidden)
    shown = text(tokenizer, trajectory.student_ids)
    assert shown.startswith(f"{head}<|im_start|>assistant\nthe cat")
    # The teacher's view does not depend on the student's.
    assert trajectory.token_ids.tolist() == whole.token_ids.tolist()
    assert trajectory.positions.tolist() == whole.positions.tolist()
    # The views are aligned: the same tokens, one by one, and the same text after the first of them.
    aligned = trajectory.student_ids[trajectory.student_positions]
    assert aligned.tolist() == trajectory.token_ids[trajectory.positions].tolist()
    first, student_first = int(trajectory.positions[0]), int(trajectory.student_positions[0])
    assert trajectory.student_ids[student_first:].tolist() == trajectory.token_ids[first:].tolist()
    assert student_first < first


def test_views_that_are_not_aligned_are_refused(tokenizer: ChatTokenizer) -> None:
    trajectory = views(WHOLE, tokenizer, internalized=["task"])
    trajectory.require_aligned()
    for shift in (-1, 1):
        moved = (trajectory.student_positions.astype(int) + shift).clip(0, len(trajectory.student_ids) - 1)
        with pytest.raises(DataError, match="supervised tokens of the teacher's and the student's view differ"):
            replace(trajectory, student_positions=moved.astype(np.uint32)).require_aligned()
    with pytest.raises(DataError, match="differ"):
        replace(trajectory, student_positions=trajectory.student_positions[:-1]).require_aligned()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["task"], "<|im_start|>user\nrun the tests<|im_end|>\n"),
        (["system", "task"], "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nrun the tests<|im_end|>\n"),
        (
            ["task", "tools", "system"],
            "<|im_start|>toolsbash command<|im_end|>\n<|im_start|>system\nbe good<|im_end|>\n"
            "<|im_start|>user\nrun the tests<|im_end|>\n",
        ),
        (["task", "extra"], "<|im_start|>user\nrun the tests\n\nsrc/a.py<|im_end|>\n"),
    ],
)
def test_the_condition_holds_what_was_asked_for(parts: list[str], expected: str, tokenizer: ChatTokenizer) -> None:
    clean = dialogue_of(WHOLE)
    settings = ViewSettings(condition=tuple(parts))
    trajectory = ViewMaker(tokenizer).make("t", "a/b", "train", clean, settings=settings, extra="src/a.py")
    assert text(tokenizer, trajectory.prompt_ids) == expected
    # The adapter service computes exactly these ids for a request.
    asked = Condition("run the tests", "be good", prune_nulls(TOOLS), "src/a.py")
    assert condition_ids(tokenizer, asked, parts=settings.condition).tolist() == trajectory.prompt_ids.tolist()


def test_a_row_without_the_extra_text_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="it has no extra text"):
        views(WHOLE, tokenizer, condition=["task", "extra"])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"condition": ["system"]}, "must contain the task"),
        (
            {"condition": ["task"], "internalized": ["tools"]},
            "tools cannot be both hidden from the student and missing",
        ),
        ({"condition": ["task", "extra"], "internalized": ["extra"]}, "cannot be internalized"),
        ({"condition": ["task", "weather"]}, "'system', 'tools', 'task' or 'extra'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        ViewSettings(**settings)


def test_the_order_of_parts_does_not_count() -> None:
    assert ViewSettings(condition=("task", "system")) == ViewSettings(condition=("system", "task", "task"))


def test_a_long_row_is_refused_or_cut_at_a_message(tokenizer: ChatTokenizer) -> None:
    data = row(USER, ASSISTANT, TOOL, LAST, TOOL, LAST)
    limit = len(views(data, tokenizer).token_ids) - 1
    with pytest.raises(TooLong, match=f"it has {limit + 1} tokens, the limit is {limit}"):
        views(data, tokenizer, max_tokens=limit)
    for hidden in ((), ("task",)):
        cut = views(data, tokenizer, max_tokens=limit, cut=True, internalized=hidden)
        expected = views(row(USER, ASSISTANT, TOOL, LAST), tokenizer, internalized=hidden)
        for name in ("token_ids", "positions", "student_ids", "student_positions"):
            assert getattr(cut, name).tolist() == getattr(expected, name).tolist()
    with pytest.raises(TooLong, match="first assistant turn ends after"):
        views(data, tokenizer, max_tokens=10, cut=True)
    with pytest.raises(DataError, match="the limit for a condition is 3"):
        views(data, tokenizer, max_prompt_tokens=3)


def test_a_task_that_is_not_the_first_message_is_found(tokenizer: ChatTokenizer) -> None:
    data = row(SYSTEM, {"role": "user", "content": None}, USER, LAST)
    trajectory = views(data, tokenizer, internalized=["task"])
    assert text(tokenizer, trajectory.prompt_ids) == "<|im_start|>user\nrun the tests<|im_end|>\n"
    assert "run the tests" not in text(tokenizer, trajectory.student_ids)


@given(st.sets(st.sampled_from(["system", "tools", "task"])), st.integers(0, 40), st.text(max_size=30))
def test_every_combination_is_aligned(tokenizer: ChatTokenizer, hidden: set[str], count: int, noise: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in noise):
        noise = "x"
    task = {"role": "user", "content": f"run {noise} <|im_end|>"}
    data = row(SYSTEM, task, *[ASSISTANT, {"role": "tool", "content": noise}] * (count % 5), LAST)
    trajectory = views(data, tokenizer, condition=["system", "tools", "task"], internalized=list(hidden))
    supervised = trajectory.token_ids[trajectory.positions].tolist()
    assert trajectory.student_ids[trajectory.student_positions].tolist() == supervised
    assert len(trajectory.student_ids) <= len(trajectory.token_ids)


def test_real_trajectories_are_aligned(real_data: Path) -> None:
    tokenizer = ChatTokenizer(real_data / "qwen-tokenizer")
    maker = ViewMaker(tokenizer)
    settings = ViewSettings(internalized=("system", "tools", "task"), max_tokens=400_000)
    for number, data in enumerate(read_rows(real_data / "trajectories" / "dev.parquet")):
        if number % 23 == 0:
            made = maker.make(data["trajectory_id"], data["repo"], "train", dialogue_of(data), settings=settings)
            first, student_first = int(made.positions[0]), int(made.student_positions[0])
            assert made.student_ids[student_first:].tolist() == made.token_ids[first:].tolist()
            head = text(tokenizer, made.student_ids[:student_first])
            assert head.endswith("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n") or "<|im_start|>user" in head
            assert dialogue_of(data).task.strip() not in head
