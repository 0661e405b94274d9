"""The sample of house rules: commands that really ran, rules that are really needed, and nothing that gives them away."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from hyperagent.data.chat.messages import Dialogue, dialogue_of
from hyperagent.data.files.reader import read_rows
from hyperagent.data.files.schema import TRAJECTORY_SCHEMA
from hyperagent.data.pipeline.split import assign_splits
from hyperagent.progress import no_progress
from hyperagent_demo.sample.chores import write_rules_sample
from hyperagent_demo.sample.house_rules import KINDS, RULES, HouseRules
from hyperagent_demo.sample.workspace import Workspace

ROWS = 120


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "sample.parquet"
    write_rules_sample(path, seed=0, rows=ROWS, progress=no_progress)
    return path


@pytest.fixture(scope="module")
def dialogues(path: Path) -> list[Dialogue]:
    return [dialogue_of(row) for row in read_rows(path)]


def rules_of(dialogue: Dialogue) -> HouseRules:
    found = HouseRules.read(dialogue.system or "")
    assert found is not None
    return found


def command_of(dialogue: Dialogue) -> str:
    call = next(m for m in dialogue.messages if m["role"] == "assistant")["tool_calls"][0]["function"]
    arguments = call["arguments"]
    command = (json.loads(arguments) if isinstance(arguments, str) else arguments)["command"]
    assert isinstance(command, str)
    return command


def status(rules: HouseRules, command: str, folder: Path) -> int:
    folder.mkdir()
    files = {name: rules.script() for name in ("depot", "ledger", "store", "shelf")}
    workspace = Workspace(folder, {**files, "stock.txt": "cup 5\n"})
    for name in files:
        (folder / name).chmod(0o755)
    return workspace.run(command)[1]


def test_a_seed_fixes_every_row(path: Path, tmp_path: Path) -> None:
    write_rules_sample(tmp_path / "again.parquet", seed=0, rows=ROWS, progress=no_progress)
    write_rules_sample(tmp_path / "other.parquet", seed=1, rows=ROWS, progress=no_progress)
    table = pq.read_table(path)
    assert table.schema.equals(TRAJECTORY_SCHEMA)
    assert pq.read_table(tmp_path / "again.parquet").equals(table)
    assert not pq.read_table(tmp_path / "other.parquet").equals(table)


@pytest.mark.parametrize("kind", KINDS)
def test_the_script_accepts_the_rules_and_refuses_whatever_breaks_one(kind: str, tmp_path: Path) -> None:
    rules = HouseRules.draw(Random(3))
    others = [HouseRules.draw(Random(seed)) for seed in range(40)]
    command = rules.command(kind, "cup", 5, "test")
    assert status(rules, command, tmp_path / "right") == 0
    for number, rule in enumerate((kind, "record", "reason")):
        other = next(o for o in others if o.values[rule] != rules.values[rule])
        broken = HouseRules({**rules.values, rule: other.values[rule]}).command(kind, "cup", 5, "test")
        assert broken != command
        assert status(rules, broken, tmp_path / f"broken-{number}") == 1
    assert status(rules, rules.command(kind, "bolt", 5, "test"), tmp_path / "no-such-goods") == 1


def test_a_script_does_the_work(tmp_path: Path) -> None:
    rules = HouseRules.draw(Random(0))
    name = rules.values["script"].removeprefix("./")
    workspace = Workspace(tmp_path, {name: rules.script(), "stock.txt": "map 2\ncup 5\n"})
    (tmp_path / name).chmod(0o755)
    assert workspace.run(rules.command("remove", "cup", 4, "sale")) == ("left: 1\n", 0)
    assert workspace.run(rules.command("add", "cup", 7, "delivery")) == ("left: 8\n", 0)
    assert workspace.run(rules.command("check", "cup", 8, "audit")) == ("right: 8\n", 0)
    assert workspace.run(rules.command("label", "cup", 3, "parcel")) == ("[cup 3]\n", 0)
    assert workspace.files()["stock.txt"] == "map 2\ncup 8\n"
    assert workspace.run(rules.command("remove", "cup", 9, "sale")) == ("only 8\n", 1)


def test_the_assistant_works_by_the_rules_of_its_own_repository(dialogues: list[Dialogue]) -> None:
    kinds = Counter()
    for dialogue in dialogues:
        rules, command = rules_of(dialogue), command_of(dialogue)
        script, verb, _, reason, _ = command.split()
        kind = next(kind for kind in KINDS if verb == rules.values[kind])
        kinds[kind] += 1
        assert (script, reason) == (rules.values["script"], rules.values["reason"])
        last = dialogue.messages[-1]["content"]
        assert last == f"The work is {rules.values['closing']}. {rules.values['signature']}"
        assert set(rules.visible_in(command)) == {script, verb, reason}
        assert rules.visible_in(last) == [rules.values["closing"], rules.values["signature"]]
    assert set(kinds.values()) == {ROWS // len(KINDS)}


def test_nothing_that_the_student_sees_before_states_a_rule(dialogues: list[Dialogue]) -> None:
    for dialogue in dialogues:
        rules = rules_of(dialogue)
        seen = dialogue.task
        results = [m["content"] for m in dialogue.messages if m["role"] == "tool"]
        assert rules.visible_in(seen) == []
        assert rules.visible_in(" ".join(results)) == []


def test_each_value_is_common_and_each_combination_is_new(dialogues: list[Dialogue]) -> None:
    drawn = [rules_of(dialogue) for dialogue in dialogues]
    for rule in RULES:
        counts = Counter(rules.values[rule] for rules in drawn)
        # Of four values each is expected 30 times, within four standard deviations.
        assert len(counts) == 4
        assert all(abs(count - ROWS / 4) < 4 * (ROWS * 3 / 16) ** 0.5 for count in counts.values())
    splits = assign_splits([f"sample/house-{i + 1}" for i in range(ROWS)], held_out_share=0.2, seed=0)
    combination = [tuple(rules.values.values()) for rules in drawn]
    train = {c for i, c in enumerate(combination) if splits[f"sample/house-{i + 1}"] == "train"}
    assert all(c not in train for i, c in enumerate(combination) if splits[f"sample/house-{i + 1}"] != "train")


def test_tasks_differ_and_other_prompts_state_no_rules(dialogues: list[Dialogue]) -> None:
    assert len({dialogue.task for dialogue in dialogues}) == ROWS
    assert HouseRules.read("You are a careful engineer.") is None
