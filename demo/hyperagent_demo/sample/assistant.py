"""Scripted assistant: each tool call acts on a workspace, and its result is recorded in a transcript."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from hyperagent_demo.sample.tools import SYSTEM_PROMPT
from hyperagent_demo.sample.workspace import SHOWN_ROOT, Workspace

Message = dict[str, Any]

CHECK = "python3 check.py"


class Assistant:
    """Writes remarks, calls tools, and records the messages in the format of the `trajectory` column."""

    def __init__(self, workspace: Workspace, prompt: str, *, random: Random) -> None:
        self.random = random
        self.messages = [_message("system", SYSTEM_PROMPT), _message("user", prompt)]
        self._workspace = workspace
        self._num_calls = 0

    def bash(self, remark: str, command: str) -> str:
        """Run a command and return its output."""
        call_id = self._call(remark, "execute_bash", command=command)
        printed, status = self._workspace.run(command)
        shown = printed.rstrip("\n") or "(no output)"
        self._result(call_id, "execute_bash", f"{shown}\n[exit code {status}]" if status else shown)
        return printed

    def view(self, remark: str, name: str) -> None:
        """Look at a file in the editor."""
        call_id = self._call(remark, "str_replace_editor", command="view", path=f"{SHOWN_ROOT}/{name}")
        self._result(call_id, "str_replace_editor", self._workspace.view(name).rstrip("\n"))

    def replace(self, remark: str, name: str, old: str, new: str) -> None:
        """Edit a file."""
        path = f"{SHOWN_ROOT}/{name}"
        call_id = self._call(remark, "str_replace_editor", command="str_replace", path=path, old_str=old, new_str=new)
        self._workspace.replace(name, old, new)
        self._result(call_id, "str_replace_editor", f"The file {path} has been edited.")

    def create(self, remark: str, name: str, text: str) -> None:
        """Create a file."""
        path = f"{SHOWN_ROOT}/{name}"
        call_id = self._call(remark, "str_replace_editor", command="create", path=path, file_text=text)
        self._workspace.create(name, text)
        self._result(call_id, "str_replace_editor", f"The file {path} has been created.")

    def think(self, thought: str) -> None:
        """Write down a thought."""
        call_id = self._call("", "think", thought=thought)
        self._result(call_id, "think", "Your thought has been logged.")

    def check(self) -> None:
        """Run the repository's check."""
        remarks = ("Now the check.", "I will run the check.", "Let me see whether the check passes.")
        self.bash(self.random.choice(remarks), CHECK)

    def finish(self, message: str) -> None:
        """End the task."""
        self._call("", "finish", message=message)

    def _call(self, remark: str, tool: str, **arguments: str) -> str:
        self._num_calls += 1
        call_id = f"call_{self._num_calls}"
        function = {"arguments": json.dumps(arguments), "name": tool}
        self.messages.append(
            _message("assistant", remark, tool_calls=[{"function": function, "id": call_id, "type": "function"}])
        )
        return call_id

    def _result(self, call_id: str, tool: str, content: str) -> None:
        self.messages.append(_message("tool", content, name=tool, tool_call_id=call_id))


def _message(
    role: str,
    content: str,
    *,
    name: str | None = None,
    tool_call_id: str | None = None,
    tool_calls: list[dict[str, Any]] | None = None,
) -> Message:
    return {
        "content": content,
        "name": name,
        "role": role,
        "tool_call_id": tool_call_id,
        "tool_calls": tool_calls,
    }
