"""The columns of nebius/SWE-rebench-openhands-trajectories, and the sample's own system prompt and tools.

Two traits of the real file are easily missed, so the sample keeps them. `properties` is one Arrow struct
with a field for every parameter of every tool, and a tool holds null in the fields that are not its own.
And the fields of every struct stand in alphabetical order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa


def _struct(**fields: pa.DataType) -> pa.DataType:
    return pa.struct(list(fields.items()))


_PARAMETER = _struct(description=pa.string(), type=pa.string())
_CHOICE = _struct(description=pa.string(), enum=pa.list_(pa.string()), type=pa.string())
_TASK = _struct(
    additionalProperties=pa.bool_(),
    properties=_struct(id=_PARAMETER, notes=_PARAMETER, status=_CHOICE, title=_PARAMETER),
    required=pa.list_(pa.string()),
    type=pa.string(),
)
_PROPERTIES = {
    "command": _CHOICE,
    "file_text": _PARAMETER,
    "insert_line": _PARAMETER,
    "is_input": _CHOICE,
    "message": _PARAMETER,
    "new_str": _PARAMETER,
    "old_str": _PARAMETER,
    "path": _PARAMETER,
    "task_list": _struct(description=pa.string(), items=_TASK, type=pa.string()),
    "thought": _PARAMETER,
    "timeout": _PARAMETER,
    "view_range": _struct(description=pa.string(), items=_struct(type=pa.string()), type=pa.string()),
}
_PARAMETERS = _struct(
    additionalProperties=pa.bool_(),
    properties=_struct(**_PROPERTIES),
    required=pa.list_(pa.string()),
    type=pa.string(),
)
_TOOL_CALL = _struct(
    function=_struct(arguments=pa.string(), name=pa.string()),
    id=pa.string(),
    type=pa.string(),
)
_MESSAGE = _struct(
    content=pa.string(),
    name=pa.string(),
    role=pa.string(),
    tool_call_id=pa.string(),
    tool_calls=pa.list_(_TOOL_CALL),
)
_TOOL = _struct(
    function=_struct(description=pa.string(), name=pa.string(), parameters=_PARAMETERS),
    type=pa.string(),
)

TRAJECTORY_SCHEMA = pa.schema(
    [
        ("trajectory_id", pa.string()),
        ("instance_id", pa.string()),
        ("repo", pa.string()),
        ("trajectory", pa.list_(_MESSAGE)),
        ("tools", pa.list_(_TOOL)),
        ("model_patch", pa.string()),
        ("exit_status", pa.string()),
        ("resolved", pa.int64()),
        ("gen_tests_correct", pa.float64()),
        ("pred_passes_gen_tests", pa.float64()),
    ]
)

SYSTEM_PROMPT = (
    "You are a careful software engineer working in a repository. Use the tools to look at files, run commands and "
    "make changes. Change only what the task asks for, check your work, and call `finish` when you are done."
)


def _tool(name: str, description: str, **parameters: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of the `tools` column; a parameter marked `optional` is left out of `required`."""
    declared = {
        key: {field: value for field, value in parameter.items() if field != "optional"}
        for key, parameter in parameters.items()
    }
    return {
        "function": {
            "description": description,
            "name": name,
            "parameters": {
                "additionalProperties": None,
                "properties": {key: declared.get(key) for key in _PROPERTIES},
                "required": [key for key, parameter in parameters.items() if not parameter.get("optional")],
                "type": "object",
            },
        },
        "type": "function",
    }


_TEXT = {"type": "string"}
_OPTIONAL_TEXT = {"type": "string", "optional": True}

TOOLS = [
    _tool("execute_bash", "Run a bash command in the repository.", command=_TEXT),
    _tool("think", "Write down a thought.", thought=_TEXT),
    _tool("finish", "End the task with a message.", message=_TEXT),
    _tool(
        "str_replace_editor",
        "View, create or edit a file.",
        command={"type": "string", "enum": ["view", "create", "str_replace"]},
        path=_TEXT,
        file_text=_OPTIONAL_TEXT,
        old_str=_OPTIONAL_TEXT,
        new_str=_OPTIONAL_TEXT,
    ),
]
