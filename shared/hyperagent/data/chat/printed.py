"""Check that a chat template prints what a conversation holds.

A template that prints no tool calls makes every row shorter and teaches the student to end its turn instead of calling a
tool, and nothing else would notice. Therefore each kind of content is rendered once in a small conversation of words that
occur nowhere else, and the words must be in the result. What a kind needs around it, such as declared tools, is in that
conversation too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from hyperagent.errors import DataError

Message = dict[str, Any]
Tool = dict[str, Any]
Render = Callable[[list[Message], list[Tool]], str]
"""Render messages and tools with a chat template; raises DataError if the template refuses them."""

LABELS = ("ids of tool calls", "names of tool results", "names of speakers", "descriptions of tools")
"""Kinds that name or describe other content. Templates of most families leave some of them out, so their loss is reported
but refuses no row."""

REASONING = ("reasoning_content", "thinking")
"""Keys of a message that hold an assistant's reasoning."""

_WORD, _NUMBER, _ID = "zqsentinel", 8_230_417, "zq4s7n1el"  # Mistral's templates take ids of nine characters only.
_END_OF_THOUGHT = "</think>"


class PrintedContent:
    """Knows which kinds of content a chat template loses; each combination is rendered once."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._is_printed: dict[tuple[str, bool, bool], bool] = {}

    def lost(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the kinds of content of a conversation that the template does not print, sorted."""
        has_system = bool(messages) and messages[0]["role"] == "system"
        found = set(_kinds(messages, tools))
        return sorted(kind for kind in found if not self._prints(kind, has_system, bool(tools)))

    def require(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
        """Require that the template prints all content of a conversation except labels.

        Raises:
            DataError: some kind of content would be lost.
        """
        if lost := [kind for kind in self.lost(messages, tools) if kind not in LABELS]:
            raise DataError(
                f"the chat template does not print its {', '.join(lost)}, which would be lost without a word; use a "
                "template that prints them, or leave them out of the data"
            )

    def _prints(self, kind: str, has_system: bool, has_tools: bool) -> bool:
        key = kind, has_system, has_tools
        if key not in self._is_printed:
            messages, tools, wanted = _PROBES[kind]()
            if has_system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": "system"}, *messages]
            if has_tools and not tools:
                tools = [_tool()]
            try:
                shown = self._render(messages, tools)
            except DataError:  # The template refuses this conversation; it will refuse such rows too, by name.
                self._is_printed[key] = True
            else:
                self._is_printed[key] = all(word in shown for word in wanted)
        return self._is_printed[key]


def _kinds(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the kinds of content that a conversation holds, with repetitions."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    last_user = users[-1] if users else -1
    for index, message in enumerate(messages):
        yield from _message_kinds(message, is_earlier=index < last_user)
    for tool in tools:
        function = tool.get("function")
        function = function if isinstance(function, Mapping) else tool
        if function.get("name"):
            yield "names of tools"
        if function.get("description"):
            yield "descriptions of tools"
        parameters = function.get("parameters")
        if isinstance(parameters, Mapping) and parameters.get("properties"):
            yield "parameters of tools"


def _message_kinds(message: Mapping[str, Any], *, is_earlier: bool) -> Iterator[str]:
    role, text = message["role"], message["content"]
    calls = message.get("tool_calls") or ()
    when = " before the last user message" if is_earlier else ""
    if text.strip():
        yield _TEXTS[role]
        if calls:
            yield "text beside tool calls"
    if role == "assistant" and _END_OF_THOUGHT in text:
        yield f"thoughts within the text{when}"
    yield from (f"{key}{when}" for key in REASONING if message.get(key))
    if message.get("name"):
        yield "names of tool results" if role == "tool" else "names of speakers"
    if message.get("tool_call_id"):
        yield "ids of tool calls"
    if len(calls) > 1:
        yield "second tool calls"
    for call in calls:
        yield "names of called tools"
        if call.get("id"):
            yield "ids of tool calls"
        for value in call["function"]["arguments"].values():
            yield "arguments of tool calls"
            if isinstance(value, Mapping | list):
                yield "nested arguments of tool calls"
            elif not isinstance(value, str):
                yield "arguments of tool calls that are not text"


_TEXTS = {"system": "system prompt", "user": "user messages", "assistant": "assistant messages", "tool": "tool results"}

_Probe = tuple[list[Message], list[Tool], list[str]]
"""Messages and tools, and the words that must be in their rendering."""


def _tool(name: str = "run", parameter: str = "command", description: str = "Run it.") -> Tool:
    declared = {"type": "string", "description": description}
    parameters = {"type": "object", "properties": {parameter: declared}, "required": [parameter]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def _user(text: str = "question") -> Message:
    return {"role": "user", "content": text}


def _answer(text: str = "answer", **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def _called(
    arguments: dict[str, Any], *, text: str = "", name: str = "run", call_id: str = "a1b2c3d4e"
) -> list[Message]:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    result = {"role": "tool", "content": "result", "tool_call_id": call_id, "name": name}
    return [_user(), _answer(text, tool_calls=[call]), result, _answer()]


def _several_calls() -> _Probe:
    messages = _called({"command": "one"})
    second = {"id": "f6g7h8i9j", "type": "function", "function": {"name": "run", "arguments": {"command": _WORD}}}
    messages[1]["tool_calls"].append(second)
    messages.insert(3, {**messages[2], "tool_call_id": second["id"]})
    return messages, [_tool()], [_WORD]


def _named_result() -> _Probe:
    messages = _called({"command": "one"})
    messages[2]["name"] = _WORD
    return messages, [_tool()], [_WORD]


def _thought(key: str | None, *, is_earlier: bool) -> _Probe:
    answer = _answer(**{key: _WORD}) if key else _answer(f"<think>\n{_WORD}\n{_END_OF_THOUGHT}\n\nanswer")
    return [_user(), answer, *([_user(), _answer()] if is_earlier else [])], [], [_WORD]


def _result_text() -> _Probe:
    messages = _called({"command": "one"})
    messages[2]["content"] = _WORD
    return messages, [_tool()], [_WORD]


_PROBES: dict[str, Callable[[], _Probe]] = {
    "system prompt": lambda: ([{"role": "system", "content": _WORD}, _user(), _answer()], [], [_WORD]),
    "user messages": lambda: ([_user(f"{_WORD}a"), _answer(), _user(f"{_WORD}b")], [], [f"{_WORD}a", f"{_WORD}b"]),
    "assistant messages": lambda: (
        [_user(), _answer(f"{_WORD}a"), _user(), _answer(f"{_WORD}b")],
        [],
        [f"{_WORD}a", f"{_WORD}b"],
    ),
    "tool results": _result_text,
    "text beside tool calls": lambda: (_called({"command": "one"}, text=_WORD), [_tool()], [_WORD]),
    "second tool calls": _several_calls,
    # Declared under another name, so that the word cannot come from the declarations.
    "names of called tools": lambda: (_called({"command": "one"}, name=_WORD), [_tool()], [_WORD]),
    "arguments of tool calls": lambda: (
        _called({"command": f"{_WORD}v", f"{_WORD}k": "value"}),
        [_tool()],
        [f"{_WORD}v", f"{_WORD}k"],
    ),
    "nested arguments of tool calls": lambda: (
        _called({"command": [f"{_WORD}v", {f"{_WORD}k": "value"}]}),
        [_tool()],
        [f"{_WORD}v", f"{_WORD}k"],
    ),
    "arguments of tool calls that are not text": lambda: (_called({"command": _NUMBER}), [_tool()], [str(_NUMBER)]),
    "ids of tool calls": lambda: (_called({"command": "one"}, call_id=_ID), [_tool()], [_ID]),
    "names of tool results": _named_result,
    "names of speakers": lambda: ([{**_user(), "name": _WORD}, _answer()], [], [_WORD]),
    "names of tools": lambda: ([_user(), _answer()], [_tool(_WORD)], [_WORD]),
    "descriptions of tools": lambda: ([_user(), _answer()], [_tool(description=_WORD)], [_WORD]),
    "parameters of tools": lambda: ([_user(), _answer()], [_tool(parameter=_WORD)], [_WORD]),
    "thoughts within the text": partial(_thought, None, is_earlier=False),
    "thoughts within the text before the last user message": partial(_thought, None, is_earlier=True),
    **{key: partial(_thought, key, is_earlier=False) for key in REASONING},
    **{f"{key} before the last user message": partial(_thought, key, is_earlier=True) for key in REASONING},
}
