"""Find a conversation's condition in a request of any of vLLM's interfaces.

Only the system prompt, the tools and the first user message count, so every turn of a conversation has the same condition,
and with it the same adapter and the same prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hyperagent.errors import InvalidRequest
from hyperagent.http.adapter_models import PromptBody

_SYSTEM = ("system", "developer")


def prompt_of(request: Any, condition: Sequence[str]) -> PromptBody:
    """Return what the adapter service is asked for.

    Args:
        request: vLLM's request: chat completion, completion or response.
        condition: parts that the hypernetwork reads.

    Raises:
        InvalidRequest: the request has no user text, or the hypernetwork reads what a request does not have.
    """
    system, task = _texts(request)
    if not task or not task.strip():
        raise InvalidRequest("hyper:auto needs a user message with text, from which the adapter is made")
    if "extra" in condition:
        raise InvalidRequest(
            "this hypernetwork reads an extra text, which a request does not have; create the adapter and name it as hyper:ID"
        )
    parts: dict[str, Any] = {"prompt": task}
    if "system" in condition:
        parts["system"] = system
    if "tools" in condition:
        tools = getattr(request, "tools", None)
        parts["tools"] = [_plain(tool) for tool in tools] if tools else None
    return PromptBody(**parts)


def _texts(request: Any) -> tuple[str | None, str | None]:
    """Return the system prompt and the first user text, None for what there is not."""
    messages = getattr(request, "messages", None)
    instructions = None
    if messages is None and hasattr(request, "input"):
        instructions, messages = getattr(request, "instructions", None), request.input
    if messages is None:
        return None, _text(getattr(request, "prompt", None))
    if isinstance(messages, str):
        return instructions, messages
    plain = [_plain(message) for message in messages]
    system = instructions or _first(plain, _SYSTEM)
    return system, _first(plain, ("user",))


def _first(messages: Iterable[Mapping[str, Any]], roles: Sequence[str]) -> str | None:
    for message in messages:
        if message.get("role") in roles and (text := _text(message.get("content"))) and text.strip():
            return text
    return None


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Iterable) and not isinstance(content, Mapping):
        parts = [
            _plain(part) if not isinstance(part, str) else {"text": part}
            for part in content
            if not isinstance(part, int)
        ]
        return "".join(str(part["text"]) for part in parts if isinstance(part.get("text"), str))
    return None


def _plain(value: Any) -> Mapping[str, Any]:
    """Return a pydantic model or a mapping as a mapping."""
    return value if isinstance(value, Mapping) else value.model_dump(exclude_none=True)
