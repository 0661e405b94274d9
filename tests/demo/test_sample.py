"""Tests of the sample against independent oracles: the real schema, a replay of every tool call, Python itself."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hyperagent.data.chat.messages import dialogue_of
from hyperagent.data.files.reader import read_rows
from hyperagent.data.files.schema import TRAJECTORY_SCHEMA
from hyperagent.data.pipeline.split import assign_splits
from hyperagent.errors import ConfigError, StorageError
from hyperagent.progress import no_progress
from hyperagent_demo.sample.assistant import Assistant
from hyperagent_demo.sample.functions import ALGORITHMS, Function
from hyperagent_demo.sample.generate import KINDS, write_sample
from hyperagent_demo.sample.repositories import invent_repositories
from hyperagent_demo.sample.tools import TOOLS
from hyperagent_demo.sample.workspace import Workspace

FUNCTIONS = [(module, function) for module, functions in ALGORITHMS.items() for function in functions]


def generate(path: Path, *, seed: int, rows: int) -> pa.Table:
    write_sample(path, seed=seed, rows=rows, progress=no_progress)
    return pq.read_table(path)


def kind_of(instance_id: str) -> str:
    match = re.fullmatch(r"sample__[a-z]+-\d+-([a-z-]+)-\d+", instance_id)
    assert match, instance_id
    return match[1]


def test_the_file_has_the_declared_schema(sample_path: Path) -> None:
    assert pq.read_schema(sample_path).equals(TRAJECTORY_SCHEMA)


def fields(kind: pa.DataType) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in kind}


def test_the_columns_read_are_typed_as_in_real_files(real_data: Path) -> None:
    real = pq.read_schema(real_data / "trajectories" / "dev.parquet")
    assert set(real.names) >= set(TRAJECTORY_SCHEMA.names)
    for name in ("trajectory_id", "repo", "trajectory", "model_patch", "exit_status", "resolved"):
        assert real.field(name).type == TRAJECTORY_SCHEMA.field(name).type, name
    # The pack combines several tool sets, so its struct of properties has more fields, in a different order.
    real_tool, tool = (fields(schema.field("tools").type.value_type) for schema in (real, TRAJECTORY_SCHEMA))
    assert real_tool.keys() == tool.keys()
    real_parameters, parameters = (fields(fields(t["function"])["parameters"]) for t in (real_tool, tool))
    assert parameters.keys() <= real_parameters.keys()
    real_properties, properties = (fields(p["properties"]) for p in (real_parameters, parameters))
    for name, kind in properties.items():
        assert {"description", "type"} <= fields(real_properties[name]).keys() & fields(kind).keys(), name


def test_rows_have_the_traits_of_the_real_file(sample_path: Path) -> None:
    for row in pq.read_table(sample_path).to_pylist():
        roles = [message["role"] for message in row["trajectory"]]
        assert roles[:3] == ["system", "user", "assistant"]
        assert roles[-1] == "assistant"
        for message in row["trajectory"]:
            assert (message["tool_calls"] is None) == (message["role"] != "assistant")
            for call in message["tool_calls"] or []:
                assert isinstance(json.loads(call["function"]["arguments"]), dict)
        # A tool has null for every parameter of the other tools.
        properties = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in row["tools"]}
        assert properties["think"]["thought"] == {"description": None, "type": "string"}
        assert properties["think"]["command"] is None


def test_there_are_enough_trajectories_repositories_and_kinds(sample_path: Path) -> None:
    table = pq.read_table(sample_path)
    repositories = Counter(table["repo"].to_pylist())
    kinds = Counter(kind_of(instance_id) for instance_id in table["instance_id"].to_pylist())
    assert table.num_rows == 72
    assert len(set(table["trajectory_id"].to_pylist())) == 72
    assert len(repositories) >= 24
    assert min(repositories.values()) >= 3
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) >= 8
    assert set(table["resolved"].to_pylist()) == {1}


def test_the_task_names_what_the_assistant_works_on(sample_path: Path) -> None:
    for row in read_rows(sample_path):
        package = re.fullmatch(r"sample/([a-z]+)-\d+", row["repo"])
        assert package
        assert f"`{package[1]}`" in dialogue_of(row).task


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = generate(tmp_path / "first.parquet", seed=5, rows=8)
    second = generate(tmp_path / "second.parquet", seed=5, rows=8)
    other = generate(tmp_path / "other.parquet", seed=6, rows=8)
    assert first.equals(second)
    assert (tmp_path / "first.parquet").read_bytes() == (tmp_path / "second.parquet").read_bytes()
    same = [a == b for a, b in zip(first["trajectory"].to_pylist(), other["trajectory"].to_pylist(), strict=True)]
    assert not any(same)


def test_nothing_of_the_machine_leaks_into_the_text(sample_path: Path) -> None:
    text = json.dumps(pq.read_table(sample_path).to_pylist())
    for trace in (tempfile.gettempdir() + "/", "hyperagent-sample", str(Path.home()) + "/", sys.executable):
        assert trace not in text


def test_every_trajectory_ends_with_a_passing_check(sample_path: Path) -> None:
    for row in read_rows(sample_path):
        *_, last_result, finish = row["trajectory"]
        assert finish["tool_calls"][0]["function"]["name"] == "finish"
        passed = re.fullmatch(r"(\d+) of (\d+) checks passed", last_result["content"])
        assert passed, last_result["content"]
        assert passed[1] == passed[2]


def test_a_minority_repairs_hastily_and_sees_the_check_fail(sample_path: Path) -> None:
    rows = list(read_rows(sample_path))
    num_hasty = 0
    for row in rows:
        names = [(m["tool_calls"] or [{"function": {"name": None}}])[0]["function"]["name"] for m in row["trajectory"]]
        if "think" in names:
            num_hasty += 1
            before = row["trajectory"][names.index("think") - 1]["content"]
            assert before.startswith("FAIL ")
            assert before.endswith("[exit code 1]")
    assert 0 < num_hasty < len(rows) / 2


def replay(messages: list[dict[str, Any]], files: dict[str, str], root: Path, commands: Path) -> list[tuple[str, str]]:
    """Repeat every tool call and return the recorded and the new results."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"}
    pairs = []
    for call, result in itertools.pairwise(messages):
        if result["role"] != "tool":
            continue
        function = call["tool_calls"][0]["function"]
        arguments = json.loads(function["arguments"])
        recorded = result["content"]
        if function["name"] == "execute_bash":
            ran = subprocess.run(
                ["bash", "-c", arguments["command"]], cwd=root, env=environment, capture_output=True, text=True
            )
            recorded = re.sub(r"\n\[exit code (\d+)\]$", "", recorded)
            pairs.append((recorded, ran.stdout.rstrip("\n") or "(no output)"))
            pairs.append((str(ran.returncode), (re.findall(r"\[exit code (\d+)\]$", result["content"]) or ["0"])[0]))
        elif function["name"] == "str_replace_editor":
            file = root / Path(arguments["path"]).relative_to("/workspace")
            if arguments["command"] == "view":
                numbered = subprocess.run(["cat", "-n", str(file)], capture_output=True, text=True, check=True)
                pairs.append((recorded, numbered.stdout.rstrip("\n")))
            elif arguments["command"] == "create":
                assert not file.exists()
                file.write_text(arguments["file_text"])
            else:
                before, after = file.read_text().split(arguments["old_str"])
                file.write_text(before + arguments["new_str"] + after)
    return pairs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_what_really_running_the_calls_gives(kind: str, seed: int, tmp_path: Path) -> None:
    repository = invent_repositories(3, seed=seed)[seed]
    random = Random(seed)
    task = KINDS[kind](repository, random)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for folder in ("generated", "replayed"):
        (tmp_path / folder).mkdir()
    workspace = Workspace(tmp_path / "generated", task.files)
    assert workspace.run(task.acceptance)[1] != 0, "the task is accepted before it is solved"
    assistant = Assistant(workspace, task.prompt, random=random)
    task.solve(assistant)
    assert workspace.run(task.acceptance)[1] == 0

    pairs = replay(assistant.messages, dict(task.files), tmp_path / "replayed", tmp_path / "bin")
    assert len(pairs) >= 2
    for recorded, replayed in pairs:
        assert recorded == replayed
    replayed_files = {
        path.relative_to(tmp_path / "replayed").as_posix(): path.read_text()
        for path in (tmp_path / "replayed").rglob("*")
        if path.is_file()
    }
    assert workspace.files() == replayed_files


@pytest.mark.parametrize(("module", "function"), FUNCTIONS, ids=[function.name for _, function in FUNCTIONS])
def test_faults_fail_the_first_case_and_fragments_are_unique(module: str, function: Function) -> None:
    source = "\n\n".join(neighbor.source for neighbor in ALGORITHMS[module])
    assert source.count(function.right) == 1
    assert f"{function.name}(" not in source.replace(f"{function.name}(", f"{function.other_name}(")
    outcomes = []
    for fragment in (function.right, function.wrong, function.near_miss):
        faulty = source.replace(function.right, fragment)
        assert faulty.count(fragment) == 1
        tests = "".join(f"print({function.name}({given}) == {expected})\n" for given, expected in function.cases)
        ran = subprocess.run([sys.executable, "-S", "-c", faulty + tests], capture_output=True, text=True, check=True)
        outcomes.append(ran.stdout.split())
    right, wrong, near_miss = outcomes
    assert set(right) == {"True"}
    assert wrong[0] == near_miss[0] == "False"


def test_repositories_can_be_held_out(sample_path: Path) -> None:
    repositories = {row["repo"] for row in read_rows(sample_path)}
    splits = assign_splits(repositories, held_out_share=0.2, seed=0)
    assert Counter(splits.values()) == {"train": 19, "held_out": 5}


def test_a_missing_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="bash, cat, grep"):
        generate(tmp_path / "sample.parquet", seed=0, rows=8)


def test_an_unusable_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"gone.*TMPDIR"):
        generate(tmp_path / "sample.parquet", seed=0, rows=8)
    assert not list(tmp_path.iterdir())


def test_progress_counts_every_row(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_sample(tmp_path / "sample.parquet", seed=1, rows=8, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(9)]


def test_tools_declare_what_calls_use(sample_path: Path) -> None:
    declared = {
        tool["function"]["name"]: {k for k, v in tool["function"]["parameters"]["properties"].items() if v}
        for tool in TOOLS
    }
    for row in read_rows(sample_path):
        for message in row["trajectory"]:
            for call in message["tool_calls"] or []:
                assert set(json.loads(call["function"]["arguments"])) <= declared[call["function"]["name"]]
