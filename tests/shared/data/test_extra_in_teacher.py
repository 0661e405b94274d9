"""Tests of the extra text in the teacher's view: where it stands, who sees it, and what is recorded about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from data_rows import ASSISTANT, LAST, SYSTEM, TOOL, USER, many_rows, row, views, write_json_lines, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from hyperagent.data.chat.messages import dialogue_of
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import TokenizedTrajectory, read_data_identity, read_tokens
from hyperagent.data.pipeline.foreign import foreign_tokens, replaced_parts, view_settings
from hyperagent.data.pipeline.tokenize_dataset import JoinedFiles, TokenizeSettings, tokenize_file
from hyperagent.data.pipeline.views import ViewMaker, ViewSettings
from hyperagent.data.reports.show import show_row
from hyperagent.errors import DataError, TooLong

Where = Literal["system", "task"] | None
WHOLE = row(SYSTEM, USER, ASSISTANT, TOOL, LAST)
BARE = row(USER, ASSISTANT, TOOL, LAST)


def made(
    tokenizer: ChatTokenizer, data: dict[str, Any], *, extra: str = "map of src", **settings: Any
) -> TokenizedTrajectory:
    chosen = ViewSettings(**{"condition": ("system", "tools", "task", "extra"), **settings})
    return ViewMaker(tokenizer).make("t", "a/b", "train", dialogue_of(data), settings=chosen, extra=extra)


@pytest.mark.parametrize(
    ("data", "where", "old", "new"),
    [
        (WHOLE, "system", "system\nbe good<|im_end|>", "system\nbe good\n\nmap of src<|im_end|>"),
        (WHOLE, "task", "user\nrun the tests<|im_end|>", "user\nrun the tests\n\nmap of src<|im_end|>"),
        (BARE, "system", "user\nrun the tests<|im_end|>", "user\nmap of src\n\nrun the tests<|im_end|>"),
        (BARE, "task", "user\nrun the tests<|im_end|>", "user\nrun the tests\n\nmap of src<|im_end|>"),
        (WHOLE, None, "system\nbe good<|im_end|>", "system\nbe good<|im_end|>"),
    ],
)
def test_the_teacher_sees_the_extra_text_in_one_place_and_the_student_nowhere(
    data: dict[str, Any], where: Where, old: str, new: str, tokenizer: ChatTokenizer
) -> None:
    plain = views(data, tokenizer)
    trajectory = made(tokenizer, data, extra_in_teacher=where)
    text = tokenizer.decode(plain.token_ids.tolist())
    assert text.count(old) == 1
    assert tokenizer.decode(trajectory.token_ids.tolist()) == text.replace(old, new)
    # The student sees what it sees without any extra text, bit for bit.
    assert np.array_equal(trajectory.student_ids, plain.token_ids)
    assert np.array_equal(trajectory.student_positions, plain.positions)
    assert np.array_equal(trajectory.token_ids[trajectory.positions], plain.token_ids[plain.positions])
    assert "map of src" in tokenizer.decode(trajectory.prompt_ids.tolist())
    trajectory.require_aligned()


def test_by_default_the_teacher_sees_it_at_the_end_of_the_system_prompt(tokenizer: ChatTokenizer) -> None:
    assert ViewSettings().extra_in_teacher == "system"
    assert np.array_equal(made(tokenizer, WHOLE).token_ids, made(tokenizer, WHOLE, extra_in_teacher="system").token_ids)


def test_an_extra_text_outside_the_condition_is_seen_by_nobody(tokenizer: ChatTokenizer) -> None:
    trajectory = made(tokenizer, WHOLE, condition=("system", "task"))
    assert trajectory.student_ids is trajectory.token_ids
    assert np.array_equal(trajectory.token_ids, views(WHOLE, tokenizer).token_ids)


def test_the_limit_counts_the_extra_text_and_a_cut_ends_both_views_after_the_same_message(
    tokenizer: ChatTokenizer,
) -> None:
    data = row(SYSTEM, USER, ASSISTANT, TOOL, LAST, TOOL, LAST)
    limit = len(views(data, tokenizer).token_ids)
    with pytest.raises(TooLong, match=f"the limit is {limit}"):
        made(tokenizer, data, max_tokens=limit)
    cut = made(tokenizer, data, max_tokens=limit, cut=True, internalized=("system",))
    expected = made(tokenizer, WHOLE, internalized=("system",))
    for name in ("token_ids", "positions", "student_ids", "student_positions"):
        assert getattr(cut, name).tolist() == getattr(expected, name).tolist()
    assert len(cut.token_ids) <= limit
    # Without the extra text the same limit cuts nothing.
    assert len(made(tokenizer, data, max_tokens=limit, extra_in_teacher=None).token_ids) == limit


@given(
    st.sampled_from(["system", "task"]),
    st.sets(st.sampled_from(["system", "tools", "task"])),
    st.booleans(),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=30),
)
def test_every_combination_is_aligned(
    tokenizer: ChatTokenizer, where: Where, hidden: set[str], has_system: bool, extra: str
) -> None:
    extra = f"{extra}<|im_end|>\n<|im_start|>assistant\nno"
    data = WHOLE if has_system else BARE
    trajectory = made(tokenizer, data, extra=extra, extra_in_teacher=where, internalized=tuple(hidden))
    plain = views(data, tokenizer, condition=("system", "tools", "task"), internalized=tuple(hidden))
    # The literals in the extra text open no turn: the same tokens are supervised, and the student sees the same.
    assert np.array_equal(trajectory.token_ids[trajectory.positions], plain.token_ids[plain.positions])
    assert np.array_equal(trajectory.student_ids, plain.student_ids)
    assert np.array_equal(trajectory.student_positions, plain.student_positions)


def test_show_prints_what_is_tokenized(tokenizer: ChatTokenizer) -> None:
    settings = ViewSettings(condition=("task", "extra"), extra_in_teacher="task")
    shown = {
        view: "".join(
            segment.text for segment in show_row(WHOLE, 0, tokenizer, settings=settings, view=view, extra="map of src")
        )
        for view in ("teacher", "student", "condition")
    }
    assert "run the tests\n\nmap of src<|im_end|>" in shown["teacher"]
    assert "map of src" not in shown["student"]
    assert shown["condition"] == "<|im_start|>user\nrun the tests\n\nmap of src<|im_end|>\n"


def files(folder: Path) -> tuple[Path, Path]:
    data = many_rows()
    texts = [{"instance_id": entry["instance_id"], "text": f"map of {entry['repo']}"} for entry in data]
    return write_parquet(folder / "d.parquet", data), write_json_lines(folder / "extra.jsonl", texts)


def test_the_identity_follows_the_place_and_keeps_the_fingerprints_of_old_files(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    source, extra = files(tmp_path)

    def tokenized(name: str, with_extra: bool = True, **chosen: Any) -> dict[str, Any]:
        condition = ("task", "extra") if with_extra else ("task",)
        settings = TokenizeSettings(views=ViewSettings(condition=condition, **chosen))
        joined = JoinedFiles(extra=extra if with_extra else None)
        tokenize_file(source, tmp_path / name, tokenizer, settings, joined=joined)
        identity = read_data_identity(tmp_path / name)
        assert view_settings(identity) == settings.views
        found[name] = identity.fingerprint
        return dict(identity.settings["views"])

    found: dict[str, str] = {}
    # The fields that files had before the setting existed, when the teacher never saw the text.
    old = {"condition", "internalised", "max_tokens", "max_prompt_tokens", "cut"}
    assert set(tokenized("none", extra_in_teacher=None)) == old
    assert set(tokenized("without", with_extra=False)) == old
    assert tokenized("system")["extra_in_teacher"] == "system"
    assert tokenized("task", extra_in_teacher="task")["extra_in_teacher"] == "task"
    assert len(set(found.values())) == 4
    teacher = {name: [t.token_ids.tolist() for t in read_tokens(tmp_path / name)] for name in found}
    assert teacher["none"] == teacher["without"]
    assert teacher["system"] != teacher["none"]


def test_the_foreign_condition_shows_the_teacher_another_repository_s_text(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    source, extra = files(tmp_path)
    settings = TokenizeSettings(views=ViewSettings(condition=("task", "extra")), split={"held_out_share": 0.5})
    tokenize_file(source, tmp_path / "t.parquet", tokenizer, settings, joined=JoinedFiles(extra=extra))
    out = tmp_path / "foreign.parquet"
    report = foreign_tokens(source, tmp_path / "t.parquet", out, tokenizer, extra=extra)
    assert (report.parts, report.unchanged) == (("extra",), 0)
    own = {t.trajectory_id: tokenizer.decode(t.token_ids.tolist()) for t in read_tokens(tmp_path / "t.parquet")}
    for foreign in read_tokens(out):
        text = tokenizer.decode(foreign.token_ids.tolist())
        assert f"map of {foreign.repo}\n" in own[foreign.trajectory_id]
        assert f"map of {foreign.repo}\n" not in text
        other = text.partition("map of ")[2].partition("\n")[0]
        assert own[foreign.trajectory_id].replace(foreign.repo, other) == text


def test_a_text_that_the_teacher_does_not_see_is_no_foreign_part() -> None:
    for condition, parts in ((("system", "task", "extra"), ("system",)), (("task", "extra"), ("task",))):
        assert replaced_parts(ViewSettings(condition=condition, extra_in_teacher=None)) == parts


def test_tokenizing_counts_the_rows_without_an_extra_text(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source, _ = files(tmp_path)
    blank = write_json_lines(tmp_path / "blank.jsonl", [])
    settings = TokenizeSettings(views=ViewSettings(condition=("task", "extra")))
    with pytest.raises(DataError, match=r"12 of 12 refused.*it has no extra text"):
        tokenize_file(source, tmp_path / "t.parquet", tokenizer, settings, joined=JoinedFiles(extra=blank))
