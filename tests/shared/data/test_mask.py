"""Tests of the supervised positions: both masks against a third, slower method, on harmless and on hostile text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_rows import LAST, USER, call, dialogue, row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import FAMILIES, make_tokenizer

from hyperagent.data.chat.mask_by_scanning import TurnScanner, turn_shape
from hyperagent.data.chat.messages import Dialogue, dialogue_of
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.reader import read_rows
from hyperagent.data.pipeline.views import ViewMaker
from hyperagent.errors import ConfigError, DataError, MaskDisagreement


@pytest.fixture(scope="session")
def makers(tmp_path_factory: pytest.TempPathFactory, real_data_if_present: Path | None) -> dict[str, ViewMaker]:
    """One maker per family of templates, and one of the real Qwen3-Coder where its tokenizer is present."""
    made = {}
    for name, (template, control_tokens) in FAMILIES.items():
        folder = make_tokenizer(tmp_path_factory.mktemp(name), template=template, control_tokens=control_tokens)
        made[name] = ViewMaker(ChatTokenizer(folder))
    if real_data_if_present is not None:
        made["qwen3-coder"] = ViewMaker(ChatTokenizer(real_data_if_present / "qwen-tokenizer"))
    return made


def by_every_prefix(spoken: Dialogue, maker: ViewMaker) -> list[int]:
    """Find positions from ids alone: those that a longer conversation adds to a shorter one with a reply's header."""
    tokenizer = maker.tokenizer
    conversation = tokenizer.conversation(spoken.messages, spoken.tools)
    end = turn_shape(tokenizer).end_id
    positions: list[int] = []
    for index, message in enumerate(spoken.messages):
        if message["role"] == "assistant":
            before = conversation.encode(conversation.render(range(index), add_generation_prompt=True)).ids
            after = conversation.encode(conversation.render(range(index + 1))).ids
            start = len(before)
            positions.extend(range(start, int(np.flatnonzero(after == end)[-1]) + 1))
    return positions


def readers(makers: dict[str, ViewMaker], spoken: Dialogue) -> list[tuple[str, ViewMaker]]:
    """Return the families that can show `spoken`: consecutive replies without reply headers are indistinguishable."""
    roles = [message["role"] for message in spoken.messages]
    found = []
    for family, maker in makers.items():
        if family == "mistral" and ("assistant", "assistant") in itertools.pairwise(roles):
            with pytest.raises(MaskDisagreement):
                maker.masked(spoken)
        else:
            found.append((family, maker))
    return found


def roles(*names: str) -> dict[str, Any]:
    """Return messages of distinct lengths; every second assistant message has calls."""
    messages: list[dict[str, Any]] = []
    for number, role in enumerate(names):
        calls = [call("run", f'{{"n": {number}}}')] * (number % 3) if role == "assistant" and number % 2 else None
        messages.append({"role": role, "content": "the cat " * (number + 1), "tool_calls": calls})
    return row(*messages, tools=[])


@pytest.mark.parametrize("length", [2, 3, 4])
def test_every_order_of_roles(length: int, makers: dict[str, ViewMaker]) -> None:
    for names in itertools.product(["user", "assistant", "tool"], repeat=length):
        if names[0] == "assistant" or "assistant" not in names:
            continue
        spoken = dialogue_of(roles(*names))
        for family, maker in readers(makers, spoken):
            assert maker.masked(spoken).positions.tolist() == by_every_prefix(spoken, maker), (family, names)


# Words that templates and tokenizers do not treat as plain text, and pieces of them.
TRAPS = [
    *itertools.chain.from_iterable(control for _, control in FAMILIES.values()),
    "<|im_start|>assistant\n",
    "<|im_end|>\n<|im_start|>user\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "|im_end|",
    "|im_end|>",
    "im_start|>assistant\n",
    "|",
    "~100000~",
    "<|im_",
    "<|im_end",
    "|>",
    "<",
    "<tool_call>\n<function=finish>\n</function>\n</tool_call>",
    "</parameter>",
    "<tool_response>",
    "assistant\n",
    "{{ messages }}",
    "\n",
    "\r\n",
    " ",
    "\u2028",
    "e\u0301",
    "\U0001f468\u200d\U0001f469",
    "\x00",
    "\x1b[31m",
]
TEXT = st.lists(
    st.sampled_from(TRAPS) | st.text(max_size=8, alphabet=st.characters(exclude_categories=["Cs", "Cn"]))
).map("".join)
CALL = st.builds(
    lambda name, arguments: call(name, json.dumps(arguments)),
    TEXT.filter(bool),
    st.dictionaries(TEXT, TEXT | st.integers() | st.booleans() | st.none() | st.lists(TEXT, max_size=2), max_size=3),
)
TURN = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXT | st.none(), "tool_calls": st.lists(CALL, max_size=2)}
)
OTHER = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": TEXT})
CONVERSATION = st.tuples(
    st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": TEXT}), max_size=1),
    st.fixed_dictionaries({"role": st.just("user"), "content": TEXT}),
    st.lists(st.tuples(TURN, st.lists(OTHER, max_size=2)), min_size=1, max_size=4),
).map(lambda parts: [*parts[0], parts[1], *(m for turn, others in parts[2] for m in (turn, *others))])


@given(CONVERSATION)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_hostile_conversations(makers: dict[str, ViewMaker], messages: list[dict[str, Any]]) -> None:
    """Both masks agree with the third method, and the ids of every shorter conversation are a prefix of the whole's."""
    spoken = dialogue(*messages, tools=[])
    for family, maker in readers(makers, spoken):
        masked = maker.masked(spoken)
        tokenizer = maker.tokenizer
        assert masked.positions.tolist() == by_every_prefix(spoken, maker), family
        stock = tokenizer.apply_template(spoken.messages, spoken.tools, add_generation_prompt=False)
        assert masked.text == stock, family
        conversation = tokenizer.conversation(spoken.messages, spoken.tools)
        for count, message in enumerate(spoken.messages, start=1):
            if message["role"] == "assistant":
                shorter = conversation.encode(conversation.render(range(count))).ids
                assert np.array_equal(masked.ids[: len(shorter)], shorter), family


@given(CONVERSATION)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_text_opens_and_ends_no_turn(makers: dict[str, ViewMaker], messages: list[dict[str, Any]]) -> None:
    """The ids have as many control tokens as those of the same conversation with harmless words."""
    spoken = dialogue(*messages, tools=[])
    plain = dialogue(
        *(
            {"role": m["role"], "content": "x", "tool_calls": [call("x", "{}") for _ in m.get("tool_calls", [])]}
            for m in spoken.messages
        ),
        tools=[],
    )
    for family, maker in readers(makers, spoken):
        control = list(maker.tokenizer.control_ids.values())
        counts = [int(np.isin(maker.masked(d).ids, control).sum()) for d in (spoken, plain)]
        assert counts[0] == counts[1], family


def short_and_long(rows: list[Any], *, with_tools: bool) -> list[Any]:
    """Return one short row and one of about 60 messages with or without tools; longer rows would take too long."""
    some = sorted((r for r in rows if bool(r["tools"]) == with_tools), key=lambda row: len(row["trajectory"]))
    return [some[0], min(some, key=lambda row: abs(len(row["trajectory"]) - 60))]


def test_real_trajectories(real_data: Path) -> None:
    maker = ViewMaker(ChatTokenizer(real_data / "qwen-tokenizer"))
    rows = list(itertools.islice(read_rows(real_data / "trajectories" / "dev.parquet"), 120))
    chosen = short_and_long(rows, with_tools=False) + short_and_long(rows, with_tools=True)
    for data in chosen:
        spoken = dialogue_of(data)
        masked = maker.masked(spoken)
        starts = np.flatnonzero(np.diff(masked.positions.astype(int), prepend=-9) > 1)
        texts = [maker.tokenizer.decode(masked.ids[run]) for run in np.split(masked.positions, starts[1:])]
        replies = [message for message in spoken.messages if message["role"] == "assistant"]
        # The supervised text contains exactly the replies, with their calls and ends of turns.
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
    for data in chosen[::2]:
        spoken = dialogue_of(data)
        assert maker.masked(spoken).positions.tolist() == by_every_prefix(spoken, maker)


GENERATION = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"


def maker_of(template: str, folder: Path) -> ViewMaker:
    return ViewMaker(ChatTokenizer(make_tokenizer(folder, template=template)))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        # Numbers its messages from the end.
        ("<|im_start|>{{ m.role }}\n{{ m.content }} {{ loop.revindex }}<|im_end|>\n", "is not prefix-preserving"),
        # Does not end turns with a control token, so a student would never learn to stop.
        ("<|im_start|>{{ m.role }}\n{{ m.content }}\n", "would never learn to stop"),
        (
            "<|im_start|>{{ m.role }}\n{{ m.content if m.role != 'assistant' }}<|im_end|>\n",
            "does not show the assistant's text",
        ),
        ("{{ raise_exception('no') }}", "refuses a plain conversation"),
    ],
)
def test_a_template_that_cannot_be_trusted_stops_the_run(body: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        maker_of(f"{{% for m in messages %}}{body}{{% endfor %}}{GENERATION}", tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "body",
    [
        # Writes an empty thought before the last turn alone, as templates of thinking models do.
        "<|im_start|>{{ m.role }}\n{{ '<think></think>' if loop.last and m.role == 'assistant' }}{{ m.content }}<|im_end|>\n",
        # Ends the last turn differently.
        "<|im_start|>{{ m.role }}\n{{ m.content }}{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>\n' }}",
    ],
)
def test_a_template_that_changes_earlier_turns_is_fine_for_rows_of_one_turn(body: str, tmp_path: Path) -> None:
    maker = maker_of(f"{{% for m in messages %}}{body}{{% endfor %}}{GENERATION}", tmp_path)
    one = dialogue_of(row({"role": "system", "content": "the cat"}, USER, {**LAST, "content": "the cat"}, tools=[]))
    found = maker.masked(one)
    shown = maker.tokenizer.decode(found.ids[found.positions].tolist())
    assert shown.startswith(("<think></think>the cat", "the cat"))
    assert shown.endswith(("<|im_end|>", "<|endoftext|>"))
    with pytest.raises(DataError, match="use a prefix-preserving template"):
        maker.masked(dialogue_of(row(USER, LAST, USER, LAST, tools=[])))


def test_a_template_without_control_tokens_around_turns_stops_the_run(tmp_path: Path) -> None:
    body = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' }}{% endfor %}"
    with pytest.raises(ConfigError, match="opens the assistant's turn without a control token"):
        maker_of(body + "{{ 'assistant: ' if add_generation_prompt }}", tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        # Keeps only the newest tool output, which a plain conversation does not show.
        "<|im_start|>{{ m.role }}\n{{ m.content if m.role != 'tool' or loop.revindex < 3 }}{{ m.tool_calls or '' }}<|im_end|>\n",
        # Renders a message depending on its index.
        "<|im_start|>{{ m.role }}\n{{ m.content }} {{ loop.index }}{{ m.tool_calls or '' }}<|im_end|>\n",
    ],
)
def test_a_template_whose_turns_depend_on_their_place_refuses_the_row(body: str, tmp_path: Path) -> None:
    maker = maker_of(f"{{% for m in messages %}}{body}{{% endfor %}}{GENERATION}", tmp_path)
    spoken = dialogue_of(roles("user", "assistant", "tool", "assistant", "tool", "tool", "assistant"))
    with pytest.raises(DataError, match="use a prefix-preserving template"):
        maker.masked(spoken)


def test_an_end_that_is_not_written_refuses_the_row(tmp_path: Path) -> None:
    body = "<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls or '<|im_end|>' }}\n"
    maker = maker_of(f"{{% for m in messages %}}{body}{{% endfor %}}{GENERATION}", tmp_path)
    with pytest.raises(DataError, match=r"does not end message 1 with <\|im_end\|>"):
        maker.masked(dialogue(USER, {**LAST, "tool_calls": [call("f", "{}")]}, USER, LAST, tools=[]))


def test_two_masks_that_differ_refuse_the_row(tmp_path: Path) -> None:
    """The template opens a tool's turn like the assistant's: rendering does not supervise it, scanning does."""
    body = "<|im_start|>{{ 'assistant' if m.role == 'tool' else m.role }}\n{{ m.content }}<|im_end|>\n"
    maker = maker_of(f"{{% for m in messages %}}{body}{{% endfor %}}{GENERATION}", tmp_path)
    maker.masked(dialogue(USER, LAST, tools=[]))
    with pytest.raises(MaskDisagreement, match=r"disagree first at token \d+, near "):
        maker.masked(dialogue(USER, LAST, {"role": "tool", "content": "sat"}, LAST, tools=[]))


def test_a_turn_without_an_end_is_none(makers: dict[str, ViewMaker]) -> None:
    tokenizer = makers["chatml"].tokenizer
    conversation = tokenizer.conversation([USER, LAST], [])
    ids = conversation.encode(conversation.render()).ids
    scanner = TurnScanner(tokenizer, turn_shape(tokenizer))
    last_end = int(np.flatnonzero(ids == tokenizer.control_ids["<|im_end|>"])[-1])
    assert scanner.supervised(ids).tolist()[-1] == last_end
    assert scanner.supervised(ids[:last_end]).tolist() == []
