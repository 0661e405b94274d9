"""Make rows and files of rows for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hyperagent.data.chat.messages import Dialogue, dialogue_of
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.schema import PARAMETER_NAMES, TRAJECTORY_SCHEMA
from hyperagent.data.files.tokens_file import TokenizedTrajectory
from hyperagent.data.pipeline.views import ViewMaker, ViewSettings

ROW = dict.fromkeys(TRAJECTORY_SCHEMA.names)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "bash",
            "description": "run",
            "parameters": {
                "type": "object",
                "required": ["command"],
                "properties": {**dict.fromkeys(PARAMETER_NAMES), "command": {"type": "string"}},
            },
        },
    }
]


def call(name: str, arguments: str | None) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "be good"}
USER = {"role": "user", "content": "run the tests"}
ASSISTANT = {"role": "assistant", "content": "the cat", "tool_calls": [call("bash", '{"command": "ls"}')]}
TOOL = {"role": "tool", "content": "sat on the mat"}
LAST = {"role": "assistant", "content": "again"}


def row(*messages: dict[str, Any], tools: list[Any] | None = None, **columns: Any) -> dict[str, Any]:
    """Return one row, with null-padded tools unless others are given."""
    whole = [{"content": None, "tool_calls": None, **message} for message in messages]
    own = {"trajectory_id": "t1", "repo": "a/b", "trajectory": whole, "tools": TOOLS if tools is None else tools}
    return {**ROW, **own, **columns}


def dialogue(*messages: dict[str, Any], tools: list[Any] | None = None) -> Dialogue:
    return dialogue_of(row(*messages, tools=tools))


def views(data: dict[str, Any], tokenizer: ChatTokenizer, **settings: Any) -> TokenizedTrajectory:
    """Return the views of one row; by default the condition is the task alone."""
    chosen = ViewSettings(**{"condition": ("task",), **settings})
    return ViewMaker(tokenizer).make(data["trajectory_id"], data["repo"], "train", dialogue_of(data), settings=chosen)


def write_parquet(path: Path, rows: Iterable[dict[str, Any]], *, row_group_size: int = 3) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=TRAJECTORY_SCHEMA), path, row_group_size=row_group_size)
    return path


def write_json_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(data)}\n" for data in rows), encoding="utf-8")
    return path


def many_rows(count: int = 12, *, repos: int = 4) -> list[dict[str, Any]]:
    return [
        row(
            {"role": "user", "content": f"task {number}"},
            {"role": "assistant", "content": "the cat sat " * (number + 1)},
            tools=[],
            trajectory_id=f"t{number}",
            instance_id=f"a__{number % repos}-{number}",
            repo=f"a/{number % repos}",
            resolved=number % 2,
            exit_status="submit" if number % 3 else "error",
        )
        for number in range(count)
    ]
