"""The sample of house rules: commands that really ran, rules that are really needed, and nothing that gives them away."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest

from hyperagent.data.chat.messages import Dialogue, dialogue_of
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.reader import read_rows
from hyperagent.data.files.schema import TRAJECTORY_SCHEMA
from hyperagent.data.files.tokens_file import TokenizedTrajectory
from hyperagent.data.pipeline.split import assign_splits
from hyperagent.data.pipeline.views import ViewMaker, ViewSettings
from hyperagent.progress import no_progress
from hyperagent_demo.sample.chores import write_rules_sample
from hyperagent_demo.sample.house_rules import KINDS, RULES, HouseRules, draw_repositories, followed
from hyperagent_demo.sample.workspace import Workspace
from hyperagent_demo.tokenizer import tokenizer_texts, train_tokenizer

ROWS = 120


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "sample.parquet"
    write_rules_sample(path, seed=0, rows=ROWS, progress=no_progress)
    return path


@pytest.fixture(scope="module")
def dialogues(path: Path) -> list[Dialogue]:
    return [dialogue_of(row) for row in read_rows(path)]


@pytest.fixture(scope="module")
def tokenizer(path: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("rules-tokenizer") / "trained"
    train_tokenizer(tokenizer_texts(path), folder)
    return ChatTokenizer(folder)


@pytest.fixture(scope="module")
def views(dialogues: list[Dialogue], tokenizer: ChatTokenizer) -> list[TokenizedTrajectory]:
    settings = ViewSettings(condition=("system", "tools", "task"), internalized=("system", "tools"))
    maker = ViewMaker(tokenizer)
    return [maker.make(str(i), "repo", "train", dialogue, settings=settings) for i, dialogue in enumerate(dialogues)]


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


def run(rules: HouseRules, command: str, folder: Path, *, good: str, held: int) -> tuple[str, int]:
    """Run a command in a repository under these rules, whose stock is one line; return its output and exit status."""
    folder.mkdir()
    name = rules.values["script"].removeprefix("./")
    workspace = Workspace(folder, {name: rules.script(), "stock.txt": f"{good} {held}\n"})
    (folder / name).chmod(0o755)
    return workspace.run(command)


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
    assert run(rules, command, tmp_path / "right", good="cup", held=5)[1] == 0
    refusals = {
        kind: ("no verb: ", 1),
        "record": ("no record: ", 1),
        "reason": ("no reason\n", 1),
        "script": (": No such file or directory\n", 127),
    }
    for rule, (message, status) in refusals.items():
        other = next(o for o in others if o.values[rule] != rules.values[rule])
        broken = HouseRules({**rules.values, rule: other.values[rule]}).command(kind, "cup", 5, "test")
        assert broken != command
        printed, found = run(rules, broken, tmp_path / f"broken-{rule}", good="cup", held=5)
        assert message in printed
        assert found == status
    elsewhere = rules.command(kind, "bolt", 5, "test")
    assert run(rules, elsewhere, tmp_path / "no-such-goods", good="cup", held=5) == ("no bolt here\n", 1)


def test_every_recorded_command_succeeds_and_prints_what_is_recorded(dialogues: list[Dialogue], tmp_path: Path) -> None:
    """The stock before the command follows from the number in the task and the one that was printed."""
    for index, dialogue in enumerate(dialogues):
        number, good = re.search(r": .*?(\d) (?:more )?([a-z]+)s\b", dialogue.task).groups()  # type: ignore[union-attr]
        printed = next(m["content"] for m in dialogue.messages if m["role"] == "tool")
        held, kind = int(number), KINDS[index % len(KINDS)]
        if kind in ("add", "remove"):
            left = int(printed.removeprefix("left: "))
            held = left - held if kind == "add" else left + held
        result = run(rules_of(dialogue), command_of(dialogue), tmp_path / str(index), good=good, held=held)
        assert result == (printed + "\n", 0)


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
    kinds: Counter[str] = Counter()
    for dialogue in dialogues:
        rules, command = rules_of(dialogue), command_of(dialogue)
        script, verb, _, reason, _ = command.split()
        kind = next(kind for kind in KINDS if verb == rules.values[kind])
        kinds[kind] += 1
        assert (script, reason) == (rules.values["script"], rules.values["reason"])
        last = dialogue.messages[-1]["content"]
        assert last == f"The work is {rules.values['closing']}. {rules.values['signature']}"
        assert followed(command, rules) == dict.fromkeys(("script", kind, "record", "reason"), True)
        assert followed(last, rules) == {"closing": True, "signature": True}
    assert set(kinds.values()) == {ROWS // len(KINDS)}


def test_what_a_text_follows_and_breaks() -> None:
    values = ["./depot", "append", "erase", "tally", "tag", "number@name", "--note", "complete", "birch"]
    rules = HouseRules(dict(zip(RULES, values, strict=True)))
    assert followed("./ledger tag 5@book --note parcel", rules) == {
        "script": False,
        "label": True,
        "record": True,
        "reason": True,
    }
    assert followed("The work is complete, or settled. Birchwood", rules) == {"closing": False}
    assert followed("store --notes x=y erases 5 @book", rules) == {}


def test_nothing_that_the_student_sees_shows_a_rule_unless_the_assistant_wrote_it(
    dialogues: list[Dialogue], views: list[TokenizedTrajectory], tokenizer: ChatTokenizer
) -> None:
    for dialogue, view in zip(dialogues, views, strict=True):
        rules = rules_of(dialogue)
        written = np.zeros(len(view.student_ids), dtype=bool)
        written[view.student_positions] = True
        others, own = (tokenizer.decode(view.student_ids[kept].tolist()) for kept in (~written, written))
        assert dialogue.task in others
        assert followed(others, rules) == {}
        # All that the assistant needs from the hidden prompt: one verb of four, and the other five rules.
        assert sorted(followed(own, rules).values()) == [True] * 6


def test_every_rule_is_at_least_one_token_that_not_all_prompts_hold(
    dialogues: list[Dialogue], tokenizer: ChatTokenizer
) -> None:
    prompts = [tokenizer.encode(dialogue.system or "").ids.tolist() for dialogue in dialogues]
    assert max(map(len, prompts)) <= 100
    common = set.intersection(*map(set, prompts))
    own = [[token for token in prompt if token not in common] for prompt in prompts]
    assert min(map(len, own)) >= len(RULES)


def test_sizes_in_tokens(views: list[TokenizedTrajectory]) -> None:
    teacher = [len(view.token_ids) for view in views]
    condition = [len(view.prompt_ids) for view in views]
    student = [len(view.student_ids) for view in views]
    supervised = [len(view.student_positions) for view in views]
    assert 150 <= min(condition) <= max(condition) <= 210
    assert 230 <= min(teacher) <= max(teacher) <= 320
    assert 60 <= min(student) <= max(student) <= 130
    assert 30 <= min(supervised) <= max(supervised) <= 90


def test_each_value_is_in_a_quarter_of_the_repositories(dialogues: list[Dialogue]) -> None:
    drawn = [rules_of(dialogue) for dialogue in dialogues]
    for rule in RULES:
        counts = Counter(rules.values[rule] for rules in drawn)
        # Of four values each is expected 30 times, within four standard deviations.
        assert len(counts) == 4
        assert all(abs(count - ROWS / 4) < 4 * (ROWS * 3 / 16) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("seed", range(8))
def test_no_held_out_repository_has_the_combination_of_another(seed: int) -> None:
    """Of 880 draws from 4^9 combinations, one or two pairs are alike, unless they are drawn again."""
    drawn = [rules for rules, _ in draw_repositories(seed, 880)]
    names = [f"sample/house-{index + 1}" for index in range(len(drawn))]
    splits = assign_splits(names, held_out_share=0.2, seed=seed)
    combinations = [tuple(rules.values[rule] for rule in RULES) for rules in drawn]
    train = {c for name, c in zip(names, combinations, strict=True) if splits[name] == "train"}
    held_out = [c for name, c in zip(names, combinations, strict=True) if splits[name] == "held_out"]
    assert len(held_out) > 100
    assert not train.intersection(held_out)
    assert len(set(combinations)) == len(drawn)


def test_tasks_differ_and_other_prompts_state_no_rules(dialogues: list[Dialogue]) -> None:
    assert len({dialogue.task for dialogue in dialogues}) == ROWS
    assert HouseRules.read("You are a careful engineer.") is None
