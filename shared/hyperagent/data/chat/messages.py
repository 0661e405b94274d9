"""Convert a row's messages and tools to the form that chat templates expect.

This module handles irregularities of data sets:
- Columnar files pad every tool's parameters, and every call's arguments that are a struct, with the keys of all others,
  which a template would print as phantom parameters. Nulls there are therefore pruned recursively.
- Columnar files and requests order the same keys differently. The tools of a condition, and arguments that are a mapping,
  therefore get one order, the alphabetical one. Arguments that are JSON text keep the order that they were written in.
- Arguments are JSON text, but templates iterate a mapping. They are therefore parsed.
- `tool_calls` may be null, missing, empty or the string "None".

docs/data.md has the table of the keys of a message: passed to the template, refused, or counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hyperagent.data.files.columns import Row
from hyperagent.errors import DataError, RowRefused

Message = dict[str, Any]
Tool = dict[str, Any]

MAX_CHARACTERS = 4 << 20
"""Longest message, in characters.

For comparison, all messages of a trajectory of 131,072 tokens together have about 500,000 characters."""

_PASSED_ON = ("name", "tool_call_id", "reasoning_content", "thinking")
"""Keys that a message's text can be accompanied by; templates decide which of them they print."""
_CONTENT = ("content", "text", "value", "system_prompt")
"""Keys under which data sets keep a message's text; the first that is not null counts."""
_ROLE = ("role", "from")
_READ = {*_ROLE, *_CONTENT, "tool_calls", *_PASSED_ON, "weight", "refusal", "function_call"}
_READ_OF_CALL, _READ_OF_FUNCTION, _READ_OF_PART = {"id", "type", "function"}, {"name", "arguments"}, {"type", "text"}
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "ai": "assistant", "gpt": "assistant",
    "tool": "tool", "function": "tool",
}  # fmt: skip
"""Roles of data sets, and what templates call them."""
_ISSUE = re.compile(r"<(issue_description|pr_description)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class Dialogue:
    """A row's cleaned conversation."""

    messages: list[Message]
    tools: list[Tool]
    not_read: frozenset[str] = frozenset()
    """Keys of messages that hold something and are not passed to the template."""

    @property
    def system(self) -> str | None:
        """System prompt: the content of the first message if its role is "system", else None."""
        first = self.messages[0]
        return str(first["content"]) if first["role"] == "system" else None

    @property
    def task(self) -> str:
        """Text of the task: the content of the first user message that is not blank.

        Raises:
            DataError: there is no such message.
        """
        return str(self.messages[self.task_index]["content"])

    @property
    def task_index(self) -> int:
        """Index of the task's message.

        Raises:
            DataError: there is no such message.
        """
        for index, message in enumerate(self.messages):
            if message["role"] == "user" and message["content"].strip():
                return index
        raise DataError("it has no user message with text, so it has no task")

    def first(self, num_messages: int) -> Dialogue:
        """Return the dialogue cut after its first `num_messages` messages."""
        return replace(self, messages=self.messages[:num_messages])


def dialogue_of(row: Row) -> Dialogue:
    """Check and clean a row's messages and tools.

    Raises:
        DataError: the row has no id or no repository, has no assistant message, starts with one, or holds a value that
            is of the wrong type, unknown or too large.
    """
    if missing := [name for name in ("trajectory_id", "repo") if row[name] is None or row[name] == ""]:
        raise DataError(f"it has no {' and no '.join(missing)}")
    for name in ("trajectory_id", "repo"):
        _require(row[name], str, f"its {name}")
    raw = _list(row["trajectory"], "its trajectory")
    messages = [_message(index, message) for index, message in enumerate(raw)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError("it has no assistant message, so there is nothing to learn from")
    if roles[0] == "assistant":
        raise DataError("its first message is the assistant's, which has no context")
    tools = _list(row["tools"], "its tools")
    for index, tool in enumerate(tools):
        _require(tool, Mapping, f"tool {index}")
    return Dialogue(messages, prune_nulls(tools), _keys_not_read(raw))


def name_of(row: Row, number: int) -> str:
    """Return a row's name: its id, or its number (from 0) if it has none."""
    trajectory_id = row["trajectory_id"]
    return trajectory_id if isinstance(trajectory_id, str) and trajectory_id else f"row {number}"


@contextmanager
def refused_as(name: str) -> Iterator[None]:
    """Convert a row's errors to a refusal of the row called `name`.

    Raises:
        RowRefused: the block raised DataError, or met a value nested too deeply for Python's recursion limit.
    """
    try:
        yield
    except DataError as error:
        raise RowRefused(name, str(error), type(error)) from error
    except RecursionError as error:
        raise RowRefused(name, "a tool call's arguments are nested too deeply") from error


def issue_within(task: str) -> str:
    """Return the issue within a task's text.

    Agent frameworks wrap the issue in a prompt that names the repository's folder. Without such tags the whole task
    is the issue.
    """
    found = _ISSUE.search(task)
    return found.group(2) if found else task


def issue_text(task: str) -> str:
    """Return the issue within a task's text, with white space and case normalized so that it can be compared."""
    return " ".join(issue_within(task).split()).casefold()


def canonical_tools(tools: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Return declarations of tools without nulls and with their keys in alphabetical order, at every depth."""
    return [_sorted(prune_nulls(tool)) for tool in tools]


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    return value


def prune_nulls(value: Any) -> Any:
    """Return `value` without the null entries of its mappings, at every depth."""
    if isinstance(value, Mapping):
        return {key: prune_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [prune_nulls(item) for item in value]
    return value


def _message(index: int, message: Any) -> Message:
    what = f"message {index}"
    _require(message, Mapping, what)
    named = _only_one(what, {key: _role(message.get(key)) for key in _ROLE}, _ROLE)
    role = named if named in _ROLES.values() else None
    if role is None:
        raise DataError(f"{what} has the unknown role {named!r}")
    content = _text(what, _only_one(what, message, _CONTENT) or "")
    calls = message.get("tool_calls")
    if calls == "None":
        calls = None
    if message.get("function_call"):  # the form before tool_calls
        if calls:
            raise DataError(f"{what} has both tool_calls and a function_call; keep one of them")
        calls = [{"function": message["function_call"]}]
    clean = [_call(what, call) for call in _list(calls, f"tool_calls of {what}")]
    arguments = sum(len(str(call["function"]["arguments"])) for call in clean)
    if len(content) + arguments > MAX_CHARACTERS:
        raise DataError(f"{what} has {len(content) + arguments:,} characters, the limit is {MAX_CHARACTERS:,}")
    _require_trainable(what, message)
    more = {key: message[key] for key in _PASSED_ON if message.get(key) not in (None, "")}
    for key, value in more.items():
        _require(value, str, f"{key} of {what}")
    return {"role": role, "content": content, **more} | ({"tool_calls": clean} if clean else {})


def _role(named: Any) -> Any:
    """Return what templates call a role; one that is unknown as it is."""
    return _ROLES.get(named, named) if isinstance(named, str) else named


def _only_one(what: str, message: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Return the value under the first of `keys` that holds something, None if none does.

    Raises:
        DataError: two of them hold different values.
    """
    held = {key: message[key] for key in keys if message.get(key) not in (None, "", [])}
    if len({repr(value) for value in held.values()}) > 1:
        raise DataError(f"{what} has different values of {' and '.join(held)}; keep one of them")
    return next(iter(held.values()), None)


def _text(what: str, content: Any) -> str:
    """Return a message's text, which may be given in parts."""
    if not isinstance(content, list):
        _require(content, str, f"the content of {what}")
        return str(content)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{what} has a part of the type {kind!r}; only text can be read")
        texts.append(text)
    return "".join(texts)


def _require_trainable(what: str, message: Mapping[str, Any]) -> None:
    """Refuse what would change the meaning of a message if it were left out."""
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight != 1):
        raise DataError(f"{what} has the weight {weight!r}, but every turn is trained; remove the turn or its weight")
    if message.get("refusal"):
        raise DataError(f"{what} has a refusal, which is not read; write it as content")


def _keys_not_read(raw: list[Any]) -> frozenset[str]:
    return frozenset(name for message in raw for name in _names_not_read(message))


def _names_not_read(message: Mapping[str, Any]) -> Iterator[str]:
    yield from (key for key, value in message.items() if key not in _READ and value)
    calls, content = message.get("tool_calls"), message.get("content")
    for call in calls if isinstance(calls, list) else []:
        yield from (f"tool_calls.{key}" for key, value in call.items() if key not in _READ_OF_CALL and value)
        function = call["function"]
        yield from (
            f"tool_calls.function.{key}" for key, value in function.items() if key not in _READ_OF_FUNCTION and value
        )
    for part in content if isinstance(content, list) else []:
        if isinstance(part, Mapping):
            yield from (f"content.{key}" for key, value in part.items() if key not in _READ_OF_PART and value)


def _call(what: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not name:
        raise DataError(f"{what} has a tool call without a name")
    _require(name, str, f"a tool's name in {what}")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, Mapping):
        arguments = _sorted(prune_nulls(arguments))
    elif isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_refuse_constant)
        except ValueError as error:
            raise DataError(f"{what} calls {name} with arguments that are not JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"{what} calls {name} with arguments that are not a JSON object")
    call_id = call.get("id")
    if call_id is not None:
        _require(call_id, str, f"the id of a tool call in {what}")
    named = {"id": call_id} if call_id else {}
    return {**named, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _refuse_constant(name: str) -> float:
    # Python's parser accepts NaN and Infinity, which are not JSON (RFC 8259, section 6).
    raise ValueError(f"{name} is not a JSON number")


def _list(value: Any, what: str) -> list[Any]:
    if value is None:
        return []
    _require(value, list, what)
    return list(value)


def _require(value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        wanted = "text" if kind is str else "a list" if kind is list else "an object"
        shown = repr(value)
        raise DataError(f"{what} is {shown if len(shown) <= 40 else type(value).__name__}, not {wanted}")
