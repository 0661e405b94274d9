"""System prompt and tools of the sample, null-padded as in the real file (see `hyperagent.data.files.schema`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hyperagent.data.files.schema import PARAMETER_NAMES

SYSTEM_PROMPT = (
    "You are a careful software engineer working in a repository. Use the tools to look at files, run commands and "
    "make changes. Change only what the task asks for, check your work, and call `finish` when you are done."
)


def _tool(name: str, description: str, **parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return one entry of the `tools` column; a parameter marked `optional` is left out of `required`."""
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
                "properties": {key: declared.get(key) for key in PARAMETER_NAMES},
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
