"""Generate the sample of house rules: small chores, each done by one command of the repository's own script.

A trajectory has two turns of the assistant: the command, which is really run, and a closing message. What the command
and the message look like is decided by rules that only the system prompt states (`house_rules`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hyperagent.errors import StorageError
from hyperagent.progress import Progress
from hyperagent_demo.sample.house_rules import KINDS, HouseRules, draw_repositories
from hyperagent_demo.sample.table import write_table
from hyperagent_demo.sample.tools import TOOLS
from hyperagent_demo.sample.workspace import Workspace, require_commands

_GOODS = ("apple", "bolt", "book", "brick", "candle", "cup", "jar", "lamp", "map", "pen", "plate", "rope")
_TASKS: dict[str, Callable[[str, int], str]] = {
    "add": lambda good, number: f"{number} more {good}s came in. Add them.",
    "remove": lambda good, number: f"{number} {good}s went out. Remove them.",
    "check": lambda good, number: f"There should be {number} {good}s. Check it.",
    "label": lambda good, number: f"Print a label for {number} {good}s.",
}
_REASONS = {"add": "delivery", "remove": "sale", "check": "audit", "label": "parcel"}
_BASH = [tool for tool in TOOLS if tool["function"]["name"] == "execute_bash"]


def write_rules_sample(path: Path, *, seed: int, rows: int, progress: Progress) -> None:
    """Write `rows` trajectories of as many repositories in the schema of the real data set; a seed fixes them.

    Args:
        progress: called with (rows done, rows to do).

    Raises:
        ConfigError: a command that the trajectories run is not installed.
        StorageError: a file system operation failed.
    """
    require_commands()
    table = []
    for index, (rules, random) in enumerate(draw_repositories(seed, rows)):
        progress(index, rows)
        table.append(_row(rules, random, index=index, seed=seed))
    progress(rows, rows)
    write_table(path, table)


def _row(rules: HouseRules, random: Random, *, index: int, seed: int) -> dict[str, Any]:
    """Draw a chore in a repository, and do it."""
    # In turn, so that every kind has the same number of rows.
    kind = KINDS[index % len(KINDS)]
    good, number = random.choice(_GOODS), random.randint(2, 9)
    # The order's number is in no other task: rows with equal tasks count as duplicates.
    task = f"Order {index + 1}: {_TASKS[kind](good, number)}"
    command = rules.command(kind, good, number, _REASONS[kind])
    printed = _run(rules, command, {good: number if kind == "check" else number + random.randint(1, 9)})
    name = f"sample/house-{index + 1}"
    return {
        "trajectory_id": f"rules-{seed}-{index:04d}",
        "instance_id": f"{name.replace('/', '__')}-{index + 1}",
        "repo": name,
        "trajectory": [
            {"role": "system", "content": rules.system_prompt()},
            {"role": "user", "content": task},
            _call(command),
            {"role": "tool", "content": printed, "name": "execute_bash", "tool_call_id": "call_1"},
            {"role": "assistant", "content": rules.message()},
        ],
        "tools": _BASH,
        "model_patch": "",
        "exit_status": "submit",
        "resolved": 1,
        "gen_tests_correct": None,
        "pred_passes_gen_tests": None,
    }


def _run(rules: HouseRules, command: str, stock: dict[str, int]) -> str:
    """Run a command in a repository with this stock, and return what it prints."""
    name = rules.values["script"].removeprefix("./")
    files = {name: rules.script(), "stock.txt": "".join(f"{good} {number}\n" for good, number in stock.items())}
    try:
        with tempfile.TemporaryDirectory(prefix="hyperagent-sample-") as folder:
            workspace = Workspace(Path(folder), files)
            (Path(folder) / name).chmod(0o755)
            printed, status = workspace.run(command)
    except OSError as error:
        raise StorageError(
            f"could not run the sample's chores in {tempfile.gettempdir()}: {error}; "
            "free some space there, or set TMPDIR to another folder"
        ) from error
    assert status == 0, f"{command} fails: {printed}"
    return printed.rstrip("\n")


def _call(command: str) -> dict[str, Any]:
    function = {"name": "execute_bash", "arguments": json.dumps({"command": command})}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }
