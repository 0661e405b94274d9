"""Condense a trajectory to a short text: its issue, what the assistant ran, and its final message."""

from __future__ import annotations

from hyperagent.data.chat.messages import Dialogue, Message, issue_within

_MAX_STEP_CHARACTERS = 240
"""Longest line of a step: room for a command, not for a file that it writes."""
_ISSUE_SHARE, _ENDING_SHARE = 0.25, 0.2
"""Largest shares of the text that the issue and the final message take."""
_GAP = "(…)"


def condensed(dialogue: Dialogue, *, max_characters: int) -> str:
    """Return a dialogue as text of at most `max_characters` characters (at least 100).

    A step is a tool call with its arguments or, in a message without calls, the message, in one line each. If they do
    not all fit, the first and the last steps stay. Tool outputs and the thoughts beside a call are left out.

    Raises:
        DataError: there is no task.
    """
    assistant = [message for message in dialogue.messages if message["role"] == "assistant"]
    issue = _clipped(issue_within(dialogue.task).strip(), int(_ISSUE_SHARE * max_characters))
    final = assistant[-1]["content"].strip() or "\n".join(_steps(assistant[-1]))
    ending = _clipped(final, int(_ENDING_SHARE * max_characters))
    start, end = f"Earlier issue: {issue}\n\nSteps:\n", f"\n\nFinal message: {ending}"
    steps = [_clipped(step, _MAX_STEP_CHARACTERS) for message in assistant[:-1] for step in _steps(message)]
    return start + "\n".join(_fitting(steps, max_characters - len(start) - len(end))) + end


def _steps(message: Message) -> list[str]:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    steps = [" ".join([call["name"], *map(str, call["arguments"].values())]) for call in calls]
    # One line each, so that a step can be clipped and left out.
    return [" ".join(step.split()) for step in steps or [message["content"]] if step.strip()]


def _fitting(steps: list[str], max_characters: int) -> list[str]:
    """Return the steps that fit with a line break each, taken in turns from both ends, and a mark in the gap."""
    left = max_characters - len(_GAP) - 1
    if sum(len(step) + 1 for step in steps) <= left:
        return steps
    head: list[str] = []
    tail: list[str] = []
    for turn in range(len(steps)):
        step = steps[turn // 2] if turn % 2 == 0 else steps[-1 - turn // 2]
        left -= len(step) + 1
        if left < 0:
            break
        (head if turn % 2 == 0 else tail).append(step)
    return [*head, _GAP, *reversed(tail)]


def _clipped(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
