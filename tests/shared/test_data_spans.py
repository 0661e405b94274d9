"""The supervised tokens against slower ways to find them: rendering every prefix, and reading what was written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizer import make_tokenizer

from hyperagent.data.reader import Row, read_rows
from hyperagent.data.render import messages_of, prune_nulls, tokenise_row
from hyperagent.data.tokenizer import ChatTokenizer
from hyperagent.data.tokens import TokenisedTrajectory
from hyperagent.errors import RowRefused


def tokenise(row: Row, tokenizer: ChatTokenizer) -> TokenisedTrajectory:
    return tokenise_row(row, tokenizer, split="train", max_tokens=1_000_000, max_prompt_tokens=100_000, cut=False)


def by_every_prefix(row: Row, tokenizer: ChatTokenizer) -> list[int]:
    """Positions from ids alone: what each longer conversation adds to the shorter one with the header of a reply."""
    messages = messages_of(row)
    conversation = tokenizer.conversation(messages, prune_nulls(row["tools"] or []))
    newline = tokenizer.encode("\n").ids.tolist()
    positions: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.encode(conversation.render(range(index), add_generation_prompt=True)).ids.tolist()
            after = tokenizer.encode(conversation.render(range(index + 1))).ids.tolist()
            assert after[-len(newline) :] == newline
            positions.extend(range(len(before), len(after) - len(newline)))
    return positions


def roles(*names: str) -> Row:
    """Messages of distinct lengths, every second assistant message with a call."""
    messages: list[dict[str, Any]] = []
    for number, role in enumerate(names):
        call = {"function": {"name": "run", "arguments": f'{{"n": {number}}}'}}
        calls = [call] * (number % 3) if role == "assistant" and number % 2 else None
        messages.append({"role": role, "content": "the cat " * (number + 1), "tool_calls": calls})
    return {"trajectory_id": "t", "repo": "a/b", "trajectory": messages, "tools": []}


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_of_roles(length: int, tokenizer: ChatTokenizer) -> None:
    for names in itertools.product(["user", "assistant", "tool"], repeat=length):
        row = roles(*names)
        if "user" not in names or "assistant" not in names:
            continue
        if names[0] == "assistant":
            with pytest.raises(RowRefused, match="its first message is the assistant's"):
                tokenise(row, tokenizer)
        else:
            assert tokenise(row, tokenizer).positions.tolist() == by_every_prefix(row, tokenizer), names


def short_and_long(rows: Sequence[Row], *, with_tools: bool) -> list[Row]:
    """Of the rows with or without tools, one short row and one of about 60 messages: long ones take their time."""
    some = sorted((r for r in rows if bool(r["tools"]) == with_tools), key=lambda row: len(row["trajectory"]))
    return [some[0], min(some, key=lambda row: abs(len(row["trajectory"]) - 60))]


def test_real_trajectories(real_data: Path) -> None:
    tokenizer = ChatTokenizer(real_data / "qwen-tokenizer")
    rows = list(itertools.islice(read_rows(real_data / "trajectories" / "dev.parquet"), 120))
    chosen = short_and_long(rows, with_tools=False) + short_and_long(rows, with_tools=True)
    for row in chosen:
        trajectory = tokenise(row, tokenizer)
        starts = np.flatnonzero(np.diff(trajectory.positions.astype(int), prepend=-9) > 1)
        texts = [tokenizer.decode(trajectory.token_ids[run]) for run in np.split(trajectory.positions, starts[1:])]
        replies = [message for message in messages_of(row) if message["role"] == "assistant"]
        # Every reply is there in its own words, with its calls and its end, and nothing else is.
        for text, reply in zip(texts, replies, strict=True):
            assert text.endswith("<|im_end|>")
            assert reply["content"].strip() in text
            calls = reply.get("tool_calls", [])
            assert text.count("<tool_call>\n<function=") == len(calls)
            arguments = [(k, v) for call in calls for k, v in call["function"]["arguments"].items()]
            for name, value in arguments:
                assert f"<parameter={name}>\n{value}\n</parameter>" in text
            written = len(reply["content"]) + sum(len(str(value)) + len(name) for name, value in arguments)
            assert len(text) < written + 150 * (1 + len(arguments))
    for row in chosen[::2]:
        assert tokenise(row, tokenizer).positions.tolist() == by_every_prefix(row, tokenizer)


@pytest.mark.parametrize(
    "body",
    [
        # Shows a message by its place in the conversation, of which a turn by itself knows nothing.
        "<|im_start|>{{ m.role }}\n{{ m.content }} {{ loop.index }}<|im_end|>\n",
        # Counts its messages from the end.
        "<|im_start|>{{ m.role }}\n{{ m.content }} {{ loop.revindex }}<|im_end|>\n",
        # Keeps only the newest tool output.
        "<|im_start|>{{ m.role }}\n{{ m.content if m.role != 'tool' or loop.revindex < 3 }}<|im_end|>\n",
        # Ends the last turn in another way.
        "<|im_start|>{{ m.role }}\n{{ m.content }}{{ '<|endoftext|>' if loop.last else '<|im_end|>\n' }}",
    ],
)
def test_a_template_whose_turns_depend_on_their_place_is_refused(body: str, tmp_path: Path) -> None:
    template = (
        f"{{% for m in messages %}}{body}{{% endfor %}}{{{{ '<|im_start|>assistant\n' if add_generation_prompt }}}}"
    )
    tokenizer = ChatTokenizer(make_tokenizer(tmp_path, template=template))
    with pytest.raises(RowRefused, match="use a prefix-preserving template"):
        tokenise(roles("user", "assistant", "tool", "assistant", "tool", "tool", "assistant"), tokenizer)


def test_a_template_without_the_assistants_words_leaves_nothing_to_learn(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role != 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = ChatTokenizer(make_tokenizer(tmp_path, template=template))
    with pytest.raises(RowRefused, match="no token of it is supervised"):
        tokenise(roles("user", "assistant", "user"), tokenizer)
