"""One data set row to token ids, supervised positions and the condition view.

Three traps of the data set are dealt with here. Arrow pads every tool's parameters with the keys of all other
tools, which a chat template would print as phantom parameters: nulls are pruned, recursively. Arguments are
JSON text where templates iterate a mapping: they are parsed. `tool_calls` may be null or the string "None".

The supervised tokens are found by rendering each turn by itself: what the template adds between "assistant to
speak" and "the assistant has spoken" is what the assistant wrote. One after the other these pieces must make up
the rendering of the whole. A template for which they do not, because it drops or changes what it showed in a shorter
conversation or numbers its messages, is refused.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperagent.data.reader import Row
from hyperagent.data.tokenizer import ChatTokenizer, Conversation, Encoded
from hyperagent.data.tokens import TokenisedTrajectory
from hyperagent.errors import DataError, RowRefused

_ROLES = {"system", "user", "assistant", "tool"}


def tokenise_row(
    row: Row, tokenizer: ChatTokenizer, *, split: str, max_tokens: int, max_prompt_tokens: int, cut: bool
) -> TokenisedTrajectory:
    """Render and tokenise one row.

    Args:
        split: recorded in the result.
        cut: keep the longest run of whole messages that fits `max_tokens`, instead of refusing a longer row.

    Raises:
        RowRefused: the row cannot be used; says why.
    """
    trajectory_id = row["trajectory_id"]
    try:
        if missing := [name for name in ("trajectory_id", "repo") if not row[name]]:
            raise DataError(f"it has no {' and no '.join(missing)}")
        messages = messages_of(row)
        prompt = task_prompt(row)
        conversation = tokenizer.conversation(messages, prune_nulls(row["tools"] or []))
        rendered = conversation.render()
        encoded = tokenizer.encode(rendered)
        if len(encoded.ids) > max_tokens:
            if not cut:
                raise DataError(f"it has {len(encoded.ids)} tokens, the limit is {max_tokens}")
            messages = messages[: _messages_that_fit(messages, conversation, int(encoded.ends[max_tokens - 1]))]
            rendered = conversation.render(range(len(messages)))
            encoded = tokenizer.encode(rendered)
        positions = _positions(encoded, _assistant_spans(messages, conversation, rendered))
        prompt_ids = tokenizer.prompt_ids(prompt)
        if len(prompt_ids) > max_prompt_tokens:
            raise DataError(f"its task has {len(prompt_ids)} tokens, the limit for a prompt is {max_prompt_tokens}")
    except DataError as error:
        raise RowRefused(str(trajectory_id), str(error)) from error
    except RecursionError as error:
        raise RowRefused(str(trajectory_id), "a tool call's arguments are nested too deeply") from error
    return TokenisedTrajectory(trajectory_id, row["repo"], split, encoded.ids, positions, prompt_ids)


def task_prompt(row: Row) -> str:
    """The task's text, which is the first user message: what conditions the adapter, in training and in use.

    Raises:
        DataError: there is none.
    """
    for message in row["trajectory"] or []:
        if message["role"] == "user" and message["content"]:
            return str(message["content"])
    raise DataError("it has no user message")


def messages_of(row: Row) -> list[dict[str, Any]]:
    """A row's messages as chat templates expect them.

    Raises:
        DataError: the row is empty, a role is unknown, or a tool call has no name or no JSON object for arguments.
    """
    messages = []
    for index, message in enumerate(row["trajectory"] or []):
        role = message["role"]
        if role not in _ROLES:
            raise DataError(f"message {index} has the unknown role {role!r}")
        clean: dict[str, Any] = {"role": role, "content": message["content"] or ""}
        calls = message["tool_calls"]
        if calls and calls != "None":
            if not isinstance(calls, list):
                raise DataError(f"message {index} has tool calls that are not a list")
            clean["tool_calls"] = [_call(index, call) for call in calls]
        messages.append(clean)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("it has no assistant message, so nothing to learn from")
    return messages


def _call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = (call and call["function"]) or {}
    name = function.get("name")
    if not name:
        raise DataError(f"message {index} has a tool call without a name")
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except ValueError as error:
        raise DataError(f"message {index} calls {name} with arguments that are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise DataError(f"message {index} calls {name} with arguments that are not a JSON object")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def prune_nulls(value: Any) -> Any:
    """`value` without the null entries of its mappings, at every depth."""
    if isinstance(value, Mapping):
        return {key: prune_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [prune_nulls(item) for item in value]
    return value


def _assistant_spans(
    messages: Sequence[dict[str, Any]], conversation: Conversation, rendered: str
) -> list[tuple[int, int]]:
    """The characters of `rendered` that the assistant wrote, one span a turn.

    A turn is rendered after the messages before the first turn and those since the previous turn, not after all:
    the time is linear in the number of messages, and rendering every prefix would make it quadratic.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if turns[0] == 0:
        raise DataError("its first message is the assistant's, so nothing leads up to it")
    head = range(turns[0])
    spans = []
    opening, cursor = "", 0
    for index, previous in zip(turns, [turns[0], *turns], strict=False):
        context = [*head, *range(previous, index)]
        before = conversation.render(context, add_generation_prompt=True)
        after = conversation.render([*context, index])
        start, stop = cursor + len(before) - len(opening), cursor + len(after) - len(opening)
        if not (
            before.startswith(opening) and after.startswith(before) and rendered[cursor:stop] == after[len(opening) :]
        ):
            raise DataError(
                f"the chat template renders message {index} differently within a longer conversation; use a prefix-preserving template"
            )
        # A template's newline after the end-of-turn token is not something the assistant writes.
        spans.append((start, cursor + len(after.rstrip("\n")) - len(opening)))
        opening, cursor = conversation.render([*head, index]), stop
    return spans


def _positions(encoded: Encoded, spans: Sequence[tuple[int, int]]) -> NDArray[np.uint32]:
    """Indices of the tokens that lie inside a span; a token that only straddles one is left out."""
    supervised = np.zeros(len(encoded.ids), dtype=bool)
    for start, end in spans:
        supervised |= (encoded.starts >= start) & (encoded.ends <= end) & (encoded.ends > encoded.starts)
    # The first token has no context to be predicted from.
    supervised[:1] = False
    if not supervised.any():
        raise DataError("no token of it is supervised")
    return np.flatnonzero(supervised).astype(np.uint32)


def _messages_that_fit(messages: Sequence[dict[str, Any]], conversation: Conversation, num_characters: int) -> int:
    """Number of whole messages within `num_characters` of rendered text, up to and including an assistant message."""
    ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
    # Renderings grow with the number of messages, so the first that is too long can be searched for.
    fitting = bisect_right(ends, num_characters, key=lambda count: len(conversation.render(range(count))))
    if fitting == 0:
        raise DataError("its first assistant turn ends beyond the limit of tokens")
    return ends[fitting - 1]
