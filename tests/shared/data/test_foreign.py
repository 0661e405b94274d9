"""Trajectories under a foreign condition: which parts change, that supervised tokens do not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_rows import TOOLS, row, write_json_lines, write_parquet
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from hyperagent.cli.main import build_app
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.checked_sample import origin, require_counterparts
from hyperagent.data.files.tokens_file import TokenizedTrajectory, read_data_identity, read_tokens
from hyperagent.data.pipeline.foreign import ForeignReport, foreign_tokens, replaced_parts, view_settings
from hyperagent.data.pipeline.split import SplitSettings
from hyperagent.data.pipeline.tokenize_dataset import JoinedFiles, TokenizeSettings, tokenize_file
from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.errors import ConfigError, DataError, IdentityMismatch

REPOS = 8
SYSTEM_AND_TASK = {"condition": ("system", "task"), "internalized": ("system",)}


def rows_of(*, per_repo: int = 3, **same: Any) -> list[dict[str, Any]]:
    """Return trajectories whose system prompt, tool and task name their repository, except the parts in `same`."""
    rows = []
    for number in range(REPOS * per_repo):
        repo = number % REPOS
        tool = {**TOOLS[0], "function": {**TOOLS[0]["function"], "name": f"tool{repo}"}}
        rows.append(
            row(
                {"role": "system", "content": same.get("system", f"rules of {repo}")},
                {"role": "user", "content": same.get("task", f"task {number}")},
                {"role": "assistant", "content": f"answer {number}"},
                {"role": "tool", "content": f"output {number}"},
                {"role": "assistant", "content": "the cat sat " * (number + 1)},
                tools=same.get("tools", [tool]),
                trajectory_id=f"t{number}",
                instance_id=f"a__{repo}-{number}",
                repo=f"a/{repo}",
            )
        )
    return rows


class Files:
    """A data file and what is made from it."""

    def __init__(
        self, folder: Path, tokenizer: ChatTokenizer, rows: list[dict[str, Any]], extra: Path | None, **views: Any
    ) -> None:
        self.source = write_parquet(folder / "data.parquet", rows)
        self.tokens, self.out, self.own = (folder / f"{name}.parquet" for name in ("tokens", "foreign", "own"))
        self.tokenizer, self.extra = tokenizer, extra
        settings = TokenizeSettings(views=ViewSettings(**views), split=SplitSettings(held_out_share=0.5))
        tokenize_file(self.source, self.tokens, tokenizer, settings, joined=JoinedFiles(extra=extra))

    def check(self, **options: Any) -> ForeignReport:
        return foreign_tokens(self.source, self.tokens, self.out, self.tokenizer, extra=self.extra, **options)

    def pairs(self) -> list[tuple[TokenizedTrajectory, TokenizedTrajectory]]:
        own = {trajectory.trajectory_id: trajectory for trajectory in read_tokens(self.tokens)}
        return [(own[foreign.trajectory_id], foreign) for foreign in read_tokens(self.out)]

    def texts(self) -> list[tuple[int, str, str]]:
        """Return of each pair the number of the repository and both texts that the teacher sees."""
        return [
            (
                int(own.repo[2:]),
                self.tokenizer.decode(own.token_ids.tolist()),
                self.tokenizer.decode(foreign.token_ids.tolist()),
            )
            for own, foreign in self.pairs()
        ]


def other_repo(text: str, own: str, repo: int) -> int:
    """Return the other repository of which `text`, otherwise equal to `own`, has the system prompt."""
    for other in set(range(REPOS)) - {repo}:
        if text == own.replace(f"rules of {repo}", f"rules of {other}"):
            return other
    raise AssertionError(f"{text!r} is not {own!r} with another system prompt")


def test_the_system_prompt_is_another_held_out_repository_s_and_all_else_stays(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    files = Files(tmp_path, tokenizer, rows_of(), None, **SYSTEM_AND_TASK)
    report = files.check()
    held_out = list(read_tokens(files.tokens, split="held_out"))
    assert (report.trajectories, report.repositories, report.parts) == (12, 4, ("system",))
    assert (report.unchanged, report.refused) == (0, ())
    others = [other_repo(foreign, own, repo) for repo, own, foreign in files.texts()]
    assert {f"a/{other}" for other in others} <= {trajectory.repo for trajectory in held_out}
    assert len(set(others)) > 1
    assert [foreign.trajectory_id for _, foreign in files.pairs()] == [own.trajectory_id for own in held_out]
    for own, foreign in files.pairs():
        assert np.array_equal(own.token_ids[own.positions], foreign.token_ids[foreign.positions])
        for name in ("prompt_ids", "student_ids", "student_positions"):
            assert np.array_equal(getattr(own, name), getattr(foreign, name))
        assert (own.repo, own.split) == (foreign.repo, foreign.split)


def test_hidden_tools_and_task_are_replaced_together(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    files = Files(tmp_path, tokenizer, rows_of(), None, internalized=("tools", "task"))
    assert files.check().parts == ("tools", "task")
    for repo, own, foreign in files.texts():
        assert f"tool{repo}" in own
        assert f"tool{repo}" not in foreign
        assert f"rules of {repo}" in foreign
        other = next(other for other in range(REPOS) if f"tool{other}" in foreign)
        tasks = [number for number in range(other, 3 * REPOS, REPOS) if f"user\ntask {number}<" in foreign]
        assert len(tasks) == 1, "task and tools come from one trajectory"


def test_the_extra_text_is_replaced_with_the_other_hidden_parts(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = rows_of()
    texts = [{"instance_id": data["instance_id"], "text": f"map of {data['repo']}"} for data in rows]
    extra = write_json_lines(tmp_path / "extra.jsonl", texts)
    files = Files(tmp_path, tokenizer, rows, extra, condition=("system", "task", "extra"), internalized=("system",))
    assert files.check().parts == ("system", "extra")
    for repo, _, foreign in files.texts():
        assert f"rules of {repo}" not in foreign
        assert f"map of a/{repo}" not in foreign


@pytest.mark.parametrize(
    ("views", "parts"),
    [
        ({}, ("system", "tools")),
        ({"condition": ("task",)}, ("task",)),
        ({"condition": ("system", "task")}, ("system",)),
        ({"condition": ("system", "task", "extra")}, ("extra",)),
        ({"internalized": ("task",)}, ("task",)),
        ({"condition": ("system", "task", "extra"), "internalized": ("system",)}, ("system", "extra")),
    ],
)
def test_the_parts_that_are_replaced(views: dict[str, Any], parts: tuple[str, ...]) -> None:
    assert replaced_parts(ViewSettings(**views)) == parts


def test_a_system_prompt_may_come_or_go(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = rows_of()
    for data in rows:
        if int(data["repo"][2:]) % 2:
            del data["trajectory"][0]
    files = Files(tmp_path, tokenizer, rows, None, **SYSTEM_AND_TASK)
    files.check()
    changes = {("system\n" in own, "system\n" in foreign) for _, own, foreign in files.texts()}
    assert {(True, False), (False, True)} <= changes
    for own, foreign in files.pairs():
        assert np.array_equal(own.token_ids[own.positions], foreign.token_ids[foreign.positions])


def test_the_same_hidden_parts_everywhere_are_said_at_once(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    files = Files(tmp_path, tokenizer, rows_of(system="be good"), None, **SYSTEM_AND_TASK)
    with pytest.raises(DataError, match=r"the hidden parts \(system\) are the same in every repository"):
        files.check(own_out=files.own)
    assert not files.out.exists()
    assert not files.own.exists()


def test_repositories_with_the_same_parts_are_counted(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = rows_of()
    for data in rows:
        if data["repo"] not in ("a/0", "a/1"):
            data["trajectory"][0]["content"] = "rules of all others"
    files = Files(tmp_path, tokenizer, rows, None, **SYSTEM_AND_TASK)
    same = sum(own == foreign for _, own, foreign in files.texts()) if files.check().unchanged else -1
    assert files.check().unchanged == same
    assert 0 < same < 12


def test_a_sample_takes_turns_among_repositories_and_depends_on_the_seed(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    files = Files(tmp_path, tokenizer, rows_of(), None, **SYSTEM_AND_TASK)
    assert (files.check(rows=4).repositories, files.check(rows=5).repositories) == (4, 4)
    drawn = {}
    for seed in range(4):
        files.check(rows=4, seed=seed)
        drawn[seed] = [(own.trajectory_id, foreign.token_ids.tolist()) for own, foreign in files.pairs()]
        content = files.out.read_bytes()
        files.check(rows=4, seed=seed)
        assert files.out.read_bytes() == content
    assert len({str(sample) for sample in drawn.values()}) == 4


def test_the_own_sample_holds_the_same_trajectories_unchanged(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    files = Files(tmp_path, tokenizer, rows_of(), None, **SYSTEM_AND_TASK)
    files.check(rows=5, own_out=files.own)
    for written, (own, foreign) in zip(read_tokens(files.own), files.pairs(), strict=True):
        assert written.trajectory_id == foreign.trajectory_id
        assert np.array_equal(written.token_ids, own.token_ids)
        assert np.array_equal(written.prompt_ids, own.prompt_ids)
    whole, own_sample, foreign_sample = map(read_data_identity, (files.tokens, files.own, files.out))
    assert origin(whole) == origin(own_sample) == origin(foreign_sample) == whole.fingerprint
    assert len({identity.fingerprint for identity in (whole, own_sample, foreign_sample)}) == 3
    require_counterparts(whole, foreign_sample)
    require_counterparts(own_sample, foreign_sample)
    for pair in ((foreign_sample, own_sample), (whole, own_sample), (foreign_sample, foreign_sample)):
        with pytest.raises(IdentityMismatch, match="condition"):
            require_counterparts(*pair)


def test_a_cut_trajectory_keeps_its_turns_and_one_that_no_longer_fits_is_left_out(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    # The first turn always fits; the second one never does in one trajectory of each repository.
    rows = rows_of()
    for data in rows[:REPOS]:
        data["trajectory"][-1]["content"] *= 100
    for data in rows:
        data["trajectory"][0]["content"] = "x" * (2 + 6 * int(data["repo"][2:]))
    uncut = Files(tmp_path, tokenizer, rows, None, **SYSTEM_AND_TASK)
    whole = {trajectory.trajectory_id: len(trajectory.positions) for trajectory in read_tokens(uncut.tokens)}
    limit = 160
    files = Files(tmp_path, tokenizer, rows, None, max_tokens=limit, max_prompt_tokens=80, cut=True, **SYSTEM_AND_TASK)
    report = files.check()
    is_cut = [len(own.positions) < whole[own.trajectory_id] for own, _ in files.pairs()]
    assert any(is_cut)
    assert not all(is_cut)
    for own, foreign in files.pairs():
        assert len(foreign.token_ids) <= limit
        assert np.array_equal(own.token_ids[own.positions], foreign.token_ids[foreign.positions])
    assert report.trajectories + len(report.refused) == 12
    assert report.refused
    assert all("tokens with the system of each of 3 other repositories" in str(refusal) for refusal in report.refused)


def test_supervised_tokens_that_change_with_the_condition_are_refused_by_name(tmp_path: Path) -> None:
    """A template that shortens the assistant's turns, depending on the system prompt."""
    template = (
        "{{ tools }}{%- for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content[:5] if m.role == 'assistant' and '1' in messages[0].content else m.content }}<|im_end|>\n{% endfor -%}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
    )
    tokenizer = ChatTokenizer(make_tokenizer(tmp_path / "tokenizer", template=template))
    rows = rows_of()
    for data in rows:
        data["trajectory"][0]["content"] = f"rules {int(data['repo'][2:]) % 2}"
    files = Files(tmp_path, tokenizer, rows, None, condition=("system", "task"))
    with pytest.raises(DataError, match=r"trajectory 't\d+': its supervised tokens differ under a foreign condition"):
        files.check()


def test_other_inputs_than_those_of_the_tokens_file_are_refused(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    files = Files(tmp_path, tokenizer, rows_of(), None, **SYSTEM_AND_TASK)
    other = write_parquet(tmp_path / "other.parquet", rows_of(per_repo=2))
    with pytest.raises(IdentityMismatch, match="the fingerprint of the data file"):
        foreign_tokens(other, files.tokens, files.out, tokenizer)
    with pytest.raises(IdentityMismatch, match="the fingerprint of the file with extra texts"):
        foreign_tokens(files.source, files.tokens, files.out, tokenizer, extra=other)
    with pytest.raises(DataError, match="no trajectory in the held_out_tasks split, only in held_out, train"):
        files.check(split="held_out_tasks")
    with pytest.raises(ConfigError, match="would replace a file that it is made from"):
        foreign_tokens(files.source, files.tokens, files.tokens, tokenizer)
    another = ChatTokenizer(make_tokenizer(tmp_path / "t", template=str(tokenizer._tokenizer.chat_template) + " "))
    with pytest.raises(IdentityMismatch, match="the tokenizer of the tokens file"):
        foreign_tokens(files.source, files.tokens, files.out, another)


def test_the_settings_are_those_that_the_tokens_file_records(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    views = {"condition": ("system", "task"), "internalized": ("task",), "max_tokens": 999, "cut": True}
    files = Files(tmp_path, tokenizer, rows_of(), None, **views)
    assert view_settings(read_data_identity(files.tokens)) == ViewSettings(**views)


def test_the_command_writes_both_samples_and_reports_what_it_replaced(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    files = Files(tmp_path, tokenizer, rows_of(), None, **SYSTEM_AND_TASK)
    files.check(rows=3, seed=1, own_out=files.own)
    expected = files.out.read_bytes(), files.own.read_bytes()
    paths = ("--tokens", files.tokens, "--tokenizer", tokenizer.folder, "--own", files.own)
    arguments = ["teacher-check", "tokens", files.source, files.out, *paths, "--rows", 3, "--seed", 1, "--json"]
    for path in (files.out, files.own):
        path.unlink()
    done = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "tokens_file": str(files.out),
        "trajectories": 3,
        "repositories": 3,
        "replaced": ["system"],
        "unchanged": 0,
        "refused": [],
    }
    assert (files.out.read_bytes(), files.own.read_bytes()) == expected
