"""Generate the sample's trajectories: invented repositories, and an assistant whose commands are actually run."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from hyperagent.errors import StorageError
from hyperagent.progress import Progress
from hyperagent_demo.sample import code_tasks, file_tasks
from hyperagent_demo.sample.assistant import Assistant
from hyperagent_demo.sample.repositories import Repository, invent_repositories
from hyperagent_demo.sample.table import write_table
from hyperagent_demo.sample.task import Task
from hyperagent_demo.sample.tools import TOOLS
from hyperagent_demo.sample.workspace import Workspace, require_commands

KINDS: Mapping[str, Callable[[Repository, Random], Task]] = MappingProxyType(
    {
        "fix-function": code_tasks.fix_function,
        "rename-function": code_tasks.rename_function,
        "add-function": code_tasks.add_function,
        "change-constant": code_tasks.change_constant,
        "count-lines": file_tasks.count_lines,
        "write-settings": file_tasks.write_settings,
        "fix-import": code_tasks.fix_import,
        "find-definition": file_tasks.find_definition,
    }
)
"""Functions that draw a task, by kind of task."""

_ROWS_PER_REPOSITORY = 4
_FEWEST_REPOSITORIES = 24


def write_sample(path: Path, *, seed: int, rows: int = 120, progress: Progress) -> None:
    """Write `rows` trajectories in the schema of nebius/SWE-rebench-openhands-trajectories; a seed fixes them.

    Args:
        rows: number of trajectories; 60 or more give at least 24 repositories with several rows each.
        progress: called with (rows done, rows to do).

    Raises:
        ConfigError: a command that the trajectories run is not installed.
        StorageError: a file system operation failed.
    """
    require_commands()
    num_repositories = min(max(rows // _ROWS_PER_REPOSITORY, _FEWEST_REPOSITORIES), max(rows // 2, 1))
    repositories = invent_repositories(num_repositories, seed=seed)
    kinds = list(KINDS)
    table: list[dict[str, Any]] = []
    for index in range(rows):
        progress(index, rows)
        round_number, place = divmod(index, num_repositories)
        # Each round shifts the kinds, so that the rows of one repository have different kinds.
        kind = kinds[(index + round_number) % len(kinds)]
        table.append(_row(repositories[place], kind, index=index, seed=seed))
    progress(rows, rows)
    write_table(path, table)


def _row(repository: Repository, kind: str, *, index: int, seed: int) -> dict[str, Any]:
    """Draw a task, let the assistant solve it, and assert that the acceptance command succeeds."""
    random = Random(f"{seed}/row/{index}")
    task = KINDS[kind](repository, random)
    try:
        with tempfile.TemporaryDirectory(prefix="hyperagent-sample-") as folder:
            workspace = Workspace(Path(folder), task.files)
            assistant = Assistant(workspace, task.prompt, random=random)
            task.solve(assistant)
            printed, status = workspace.run(task.acceptance)
            patch = _patch(task.files, workspace.files())
    except OSError as error:
        raise StorageError(
            f"could not run the sample's tasks in {tempfile.gettempdir()}: {error}; "
            "free some space there, or set TMPDIR to another folder"
        ) from error
    assert status == 0, f"{kind} in {repository.name} is not solved: {printed}"
    return {
        "trajectory_id": f"sample-{seed}-{index:04d}",
        "instance_id": f"{repository.name.replace('/', '__')}-{kind}-{index}",
        "repo": repository.name,
        "trajectory": assistant.messages,
        "tools": TOOLS,
        "model_patch": patch,
        "exit_status": "submit",
        "resolved": 1,
        "gen_tests_correct": None,
        "pred_passes_gen_tests": None,
    }


def _patch(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Return a unified diff of all files."""
    lines: list[str] = []
    for name in sorted({*before, *after}):
        old, new = (files.get(name, "").splitlines(keepends=True) for files in (before, after))
        lines += difflib.unified_diff(
            old, new, f"a/{name}" if name in before else "/dev/null", f"b/{name}" if name in after else "/dev/null"
        )
    return "".join(lines)
