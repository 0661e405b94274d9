"""Tests of the potential: counted by hand on small files, and in the known order on real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_rows import TOOLS, call, dialogue, row, write_parquet

from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.data.reports.hidden_words import all_words, hidden_words, words_of
from hyperagent.data.reports.potential import Potential, WordCounts, measure_potential
from hyperagent.errors import DataError

HIDDEN = ViewSettings(internalized=("system", "tools"))
EXTRA = ViewSettings(condition=("task", "extra"))


def test_words_are_runs_of_three_or_more_with_a_letter() -> None:
    assert list(words_of("Fix src/a_b.py: ab, 1234, x12 ÉCOLE of 2nd_run")) == [
        "fix",
        "src",
        "a_b",
        "x12",
        "école",
        "2nd_run",
    ]


def test_words_of_one_dialogue_by_hand() -> None:
    data = dialogue(
        {"role": "system", "content": "Always finish with willow. Say cedar."},
        {"role": "user", "content": "please say something"},
        {"role": "assistant", "content": "I say cedar", "tool_calls": [call("bash", '{"command": "echo willow"}')]},
        {"role": "tool", "content": "finish it"},
        {"role": "assistant", "content": "finish: Willow birch"},
        tools=TOOLS,
    )
    found = hidden_words(data, HIDDEN, None)
    # say, cedar, bash, command, echo, willow; finish, willow, birch.
    assert found.supervised == 9
    # All but echo and birch: bash and command are in the tools.
    assert found.in_hidden == 7
    # "say" is in the task, "finish" in the tool's output, the second willow after the first.
    assert found.unseen == {"cedar": 1, "bash": 1, "command": 1, "willow": 1}
    assert hidden_words(data, ViewSettings(internalized=("system",)), None).unseen == {"cedar": 1, "willow": 1}
    assert hidden_words(data, ViewSettings(), None).in_hidden == 0
    assert hidden_words(data, ViewSettings(internalized=("task",)), None).unseen == {}
    assert {"willow", "please", "bash", "command", "echo", "birch"} <= all_words(data)


def test_an_extra_text_is_hidden_only_where_the_teacher_sees_it() -> None:
    data = dialogue({"role": "user", "content": "run the tests"}, {"role": "assistant", "content": "with tox now"})
    assert hidden_words(data, EXTRA, "use tox").unseen == {"tox": 1}
    nowhere = ViewSettings(condition=("task", "extra"), extra_in_teacher=None)
    assert hidden_words(data, nowhere, "use tox").unseen == {}
    assert hidden_words(data, ViewSettings(condition=("task",)), "use tox").unseen == {}


def rules_of(rules: list[str], *, per_repo: int = 2) -> list[dict[str, Any]]:
    """Return rows of repositories, each with its own rule in the system prompt, which the assistant follows."""
    return [
        row(
            {"role": "system", "content": f"mark everything with {rule}"},
            {"role": "user", "content": f"task of {repo} number {attempt}"},
            {"role": "assistant", "content": f"mark everything done: {rule}"},
            tools=[],
            trajectory_id=f"t{repo}-{attempt}",
            instance_id=f"a__{repo}-{attempt}",
            repo=f"a/{repo}",
        )
        for repo, rule in enumerate(rules)
        for attempt in range(per_repo)
    ]


def measure(path: Path, rows: list[dict[str, Any]], views: ViewSettings = HIDDEN, **options: Any) -> Potential:
    settings = {"extra_of": {}, "sample": 1000, **options}
    return measure_potential(write_parquet(path / "d.parquet", rows), views, **settings)


def test_only_words_that_are_rare_elsewhere_count(tmp_path: Path) -> None:
    # Five repositories: cedar in two of them, so in one of four others (25 %); birch in three, so in half of the others.
    found = measure(tmp_path, rules_of(["cedar", "cedar", "birch", "birch", "birch"]))
    # Each trajectory writes mark, everything, done and its rule; all but "done" are hidden and not seen before.
    assert found.total == WordCounts(supervised=40, in_hidden=30, unseen=30, rare=4)
    assert found.total.potential == 0.1
    by_repo = {repo.repo: repo for repo in found.repos}
    assert by_repo["a/0"].counts == WordCounts(supervised=8, in_hidden=6, unseen=6, rare=2)
    assert by_repo["a/0"].examples == {"cedar": 2}
    assert by_repo["a/4"].counts.rare == 0
    assert [repo.repo for repo in found.repos] == ["a/0", "a/1", "a/2", "a/3", "a/4"]
    assert found.verdict.startswith("there is something to distill: 10.00% of the assistant's words")


def test_a_word_is_as_frequent_as_the_whole_texts_of_others_say(tmp_path: Path) -> None:
    rows = rules_of(["cedar", "birch", "willow", "maple", "hazel"])
    assert measure(tmp_path, rows).total.rare == 10
    for entry in rows[2:6]:
        entry["trajectory"].insert(2, {"role": "user", "content": "not like cedar", "tool_calls": None})
    # Now two of the four others mention cedar, one in each of two repositories.
    assert measure(tmp_path, rows).total.rare == 8


def test_a_view_that_hides_nothing_leaves_nothing_to_distill(tmp_path: Path) -> None:
    found = measure(tmp_path, rules_of(["cedar", "birch", "willow"]), ViewSettings())
    assert found.total == WordCounts(supervised=24, in_hidden=0, unseen=0, rare=0)
    assert found.verdict.startswith("nothing to distill here: 0.00% of the assistant's words")
    assert "hyperagent data extra" in found.verdict


def test_rows_without_an_extra_text_are_left_out(tmp_path: Path) -> None:
    rows = rules_of(["cedar", "birch", "willow"])
    for entry in rows:
        del entry["trajectory"][0]
    extra_of = {entry["instance_id"]: entry["trajectory"][1]["content"] for entry in rows[:4]}
    found = measure(tmp_path, rows, EXTRA, extra_of=extra_of)
    assert (found.trajectories, found.left_out) == (4, {"no extra text": 2})
    assert found.total == WordCounts(supervised=16, in_hidden=16, unseen=16, rare=4)
    with pytest.raises(DataError, match=r"2 rows .* fewer than two repositories"):
        measure(tmp_path, rows, EXTRA, extra_of=dict(list(extra_of.items())[:2]))


def test_a_sample_is_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = rules_of([f"rule{number}" for number in range(20)])
    drawn = [measure(tmp_path, rows, sample=10, seed=seed) for seed in (0, 0, 1)]
    assert [found.trajectories for found in drawn] == [10, 10, 10]
    assert drawn[0].left_out == {"not in the sample": 30}
    assert drawn[0] == drawn[1]
    assert {repo.repo for repo in drawn[0].repos} != {repo.repo for repo in drawn[2].repos}


def test_unusable_rows_are_refused_by_name(tmp_path: Path) -> None:
    rows = rules_of(["cedar", "birch", "willow"])
    rows[3]["trajectory"] = []
    found = measure(tmp_path, rows)
    assert (found.trajectories, [refusal.trajectory_id for refusal in found.refused]) == (5, ["t1-1"])


def test_real_trajectories_have_next_to_nothing_to_distill(real_data: Path) -> None:
    source = real_data / "trajectories" / "dev.parquet"
    shares = [
        measure_potential(source, ViewSettings(internalized=hidden), extra_of={}, sample=1000).total.potential
        for hidden in ((), ("system", "tools"), ("system", "tools", "task"))
    ]
    assert shares[0] == 0
    assert 0.001 < shares[1] < 0.003
    assert shares[1] < shares[2] < 0.006
