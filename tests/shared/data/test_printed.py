"""Tests that content which a chat template would lose refuses its row by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_rows import TOOLS, call, dialogue, row
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import TEMPLATE, make_tokenizer

from hyperagent.data.chat.messages import dialogue_of
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.pipeline.views import Condition, ViewMaker, condition_ids
from hyperagent.errors import ConfigError, DataError

GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"


def chatml(body: str, *, before: str = "{{ tools or '' }}", loop: str = "") -> str:
    """Return a ChatML template whose turns hold `body`."""
    turn = f"<|im_start|>{{{{ m.role }}}}\n{body}<|im_end|>\n"
    return f"{before}{{% for m in messages {loop}%}}{turn}{{% endfor %}}{GENERATION}"


def maker_of(template: str, folder: Path) -> ViewMaker:
    return ViewMaker(ChatTokenizer(make_tokenizer(folder, template=template)))


ASK: dict[str, Any] = {"role": "user", "content": "Mend it."}
SYSTEM: dict[str, Any] = {"role": "system", "content": "You mend code."}
LOOK: dict[str, Any] = {
    "role": "assistant",
    "content": "I look.",
    "tool_calls": [{**call("run", '{"command": "ls"}'), "id": "c1"}],
}
SEEN: dict[str, Any] = {"role": "tool", "content": "a.py", "tool_call_id": "c1", "name": "run"}
DONE: dict[str, Any] = {"role": "assistant", "content": "Done."}
THOUGHT: dict[str, Any] = {**DONE, "reasoning_content": "Nothing is left to do."}


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (chatml("{{ m.content }}"), [ASK, LOOK, SEEN, DONE], "arguments of tool calls, names of called tools"),
        (chatml("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"),
         [ASK, LOOK, SEEN, DONE], "arguments of tool calls"),
        (chatml("{{ m.tool_calls or m.content }}"), [ASK, LOOK, SEEN, DONE], "text beside tool calls"),
        (chatml("{{ m.content }}" + CALLS, before=""), [ASK, LOOK, SEEN, DONE], "names of tools, parameters of tools"),
        (chatml("{{ m.content }}" + CALLS, loop="if m.role != 'system' "), [SYSTEM, ASK, DONE], "system prompt"),
        (chatml("{{ m.content }}" + CALLS), [ASK, THOUGHT], "reasoning_content"),
        (chatml("{{ m.content }}{{ m.reasoning_content if loop.last else '' }}" + CALLS),
         [ASK, THOUGHT, ASK, DONE], "reasoning_content before the last user message"),
        (chatml("{{ m.content.split('</think>')[-1] }}" + CALLS),
         [ASK, {**DONE, "content": "<think>So</think>Done."}], "thoughts within the text"),
        (chatml("{{ m.content }}{% for c in (m.tool_calls or [])[:1] %}{{ c }}{% endfor %}"),
         [ASK, {**LOOK, "tool_calls": LOOK["tool_calls"] * 2}, SEEN, DONE], "second tool calls"),
        (chatml("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
                "{% for k, v in c.function.arguments | items %}{{ k }}{{ v if v is string }}{% endfor %}{% endfor %}"),
         [ASK, {**LOOK, "tool_calls": [call("run", '{"n": 7}')]}, SEEN, DONE], "arguments of tool calls that are not text"),
        (chatml("{{ m.content if m.role != 'tool' }}" + CALLS), [ASK, LOOK, SEEN, DONE], "tool results"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_print_refuses_the_row_by_name(
    template: str, messages: list[dict[str, Any]], lost: str, tmp_path: Path
) -> None:
    maker = maker_of(template, tmp_path)
    with pytest.raises(DataError, match=f"the chat template does not print its {lost}, which would be lost"):
        maker.masked(dialogue_of(row(*messages, tools=TOOLS)))
    # A row without that content is not refused.
    if lost not in ("names of tools, parameters of tools", "system prompt"):
        maker.masked(dialogue_of(row(ASK, DONE, tools=TOOLS)))


def test_labels_are_passed_on_and_their_loss_is_known(tmp_path: Path) -> None:
    spoken = dialogue_of(row(ASK, LOOK, SEEN, DONE, tools=TOOLS))
    ids = chatml(
        "{% if m.role == 'tool' %}[{{ m.name }} {{ m.tool_call_id }}]{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call id={{ c.id }}>{{ c.function | tojson }}</call>{% endfor %}"
    )
    printing = maker_of(ids, tmp_path / "ids")
    text = printing.masked(spoken).text
    assert "[run c1]a.py" in text
    assert '<call id=c1>{"name": "run"' in text
    assert printing.tokenizer.printed.lost(spoken.messages, spoken.tools) == []
    leaving_out = maker_of(chatml("{{ m.content }}" + CALLS), tmp_path / "none")
    lost = leaving_out.tokenizer.printed.lost(spoken.messages, spoken.tools)
    assert lost == ["ids of tool calls", "names of tool results"]
    leaving_out.masked(spoken)


def test_a_condition_that_the_template_does_not_print_is_refused(tmp_path: Path) -> None:
    tokenizer = maker_of(chatml("{{ m.content }}" + CALLS, before=""), tmp_path).tokenizer
    parts = ["system", "tools", "task"]
    with pytest.raises(DataError, match="does not print its names of tools, parameters of tools"):
        condition_ids(tokenizer, Condition("Mend it.", "You mend.", TOOLS), parts=parts)
    condition_ids(tokenizer, Condition("Mend it.", "You mend."), parts=parts)


def shuffled(value: Any, draw: st.DrawFn) -> Any:
    """Return `value` with the keys of its mappings in another order, padded with nulls as in a columnar file."""
    if isinstance(value, dict):
        keys = draw(st.permutations([*value, "padded"]))
        return {key: shuffled(value.get(key), draw) for key in keys}
    return [shuffled(item, draw) for item in value] if isinstance(value, list) else value


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_same_tools_are_the_same_condition_from_any_file_and_request(data: st.DataObject) -> None:
    tokenizer = _tokenizer()
    other = shuffled(TOOLS, data.draw)
    found = [
        condition_ids(tokenizer, Condition("Mend it.", None, tools), parts=["tools", "task"])
        for tools in (TOOLS, other)
    ]
    assert np.array_equal(*found)
    # Arguments that are a mapping come from columnar files too: their nulls are no content, and their order is not the model's.
    arguments = {"command": "ls", "options": {"long": True}}
    calls = [call("run", value) for value in (arguments, shuffled(arguments, data.draw))]
    spoken = [dialogue_of(row(ASK, {**LOOK, "tool_calls": [c]}, SEEN, DONE, tools=[])).messages[1] for c in calls]
    assert list(spoken[0]["tool_calls"][0]["function"]["arguments"].items()) == list(
        spoken[1]["tool_calls"][0]["function"]["arguments"].items()
    )


_TOKENIZERS: list[ChatTokenizer] = []


def _tokenizer() -> ChatTokenizer:
    if not _TOKENIZERS:
        import tempfile

        folder = Path(tempfile.mkdtemp())
        _TOKENIZERS.append(ChatTokenizer(make_tokenizer(folder, template=TEMPLATE)))
    return _TOKENIZERS[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"weight": 0}, "has the weight 0, but every turn is trained"),
        ({"refusal": "I cannot."}, "has a refusal, which is not read"),
        ({"reasoning_content": ["a"]}, "reasoning_content of message 1 is"),
    ],
)
def test_keys_that_would_change_the_meaning_refuse_the_row(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError, match=why):
        dialogue_of(row(ASK, {**DONE, **changes}, tools=[]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"content": "One.", "text": "Two."}, "has different values of content and text"),
        ({"content": "One.", "value": "Two."}, "has different values of content and value"),
        ({"from": "human"}, "has different values of role and from"),
        ({"tool_calls": LOOK["tool_calls"], "function_call": {"name": "f", "arguments": "{}"}}, "both tool_calls and a function_call"),
    ],
)  # fmt: skip
def test_a_message_that_says_two_things_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError, match=why):
        dialogue_of(row(ASK, {**DONE, **changes}, tools=[]))


def test_text_under_another_key_beside_an_empty_one_is_the_text() -> None:
    for message in (
        {**DONE, "content": "", "text": "Done."},
        {**DONE, "text": "Done."},
        {"role": "assistant", "value": "Done."},
    ):
        assert dialogue_of(row(ASK, message, tools=[])).messages[1]["content"] == "Done."


def test_keys_within_calls_and_parts_that_are_not_read_are_known() -> None:
    called = {**LOOK, "tool_calls": [{**LOOK["tool_calls"][0], "index": 3}]}
    called["tool_calls"][0]["function"] = {**called["tool_calls"][0]["function"], "strict": True}
    parts = {**DONE, "content": [{"type": "text", "text": "Done.", "annotations": ["x"]}]}
    spoken = dialogue(ASK, called, SEEN, parts, tools=[])
    assert spoken.not_read == {"tool_calls.index", "tool_calls.function.strict", "content.annotations"}


def test_a_template_finds_the_keys_of_the_format_whatever_the_control_tokens_are(tmp_path: Path) -> None:
    """`id` is a piece of `<|video_pad|>`, and the texts hold literals of control tokens."""
    template = chatml(
        "{{ m.content }}{% for c in m.tool_calls or [] %}<call id={{ c.id }}>{{ c.function | tojson }}{% endfor %}"
    )
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|video_pad|>", "<|name|>", "<|function|>", "<|role|>"]
    maker = ViewMaker(ChatTokenizer(make_tokenizer(tmp_path, template=template, control_tokens=tokens)))
    spoken = dialogue_of(row(ASK, {**LOOK, "content": "I write <|im_end|>."}, SEEN, DONE, tools=TOOLS))
    assert "<call id=c1>" in maker.masked(spoken).text


def test_keys_that_are_not_read_are_known() -> None:
    spoken = dialogue(ASK, {**DONE, "weight": 1, "annotations": [1], "audio": None, "refusal": None}, tools=[])
    assert spoken.not_read == {"annotations"}


def test_a_template_prints_the_same_date_on_every_day(tmp_path: Path) -> None:
    tokenizer = maker_of(
        chatml("{{ m.content }}", before="Today is {{ strftime_now('%d %b %Y') }}"), tmp_path
    ).tokenizer
    assert tokenizer.apply_template([ASK], [], add_generation_prompt=False).startswith("Today is 26 Jul 2024")
    other = maker_of(
        chatml("{{ m.content }}", before="{{ strftime_now('%A, %-d.%-m.%y %H:%M') }}"), tmp_path / "other"
    ).tokenizer
    assert other.apply_template([ASK], [], add_generation_prompt=False).startswith("Friday, 26.7.24 00:00")


@pytest.mark.parametrize(
    "draw",
    [
        "{{ ['a', 'b'] | random }}",
        "{{ lipsum(1) }}",
        "{{ [['a', 'b']] | map('random') | join }}",
        "{% set f = lipsum %}{{ f() }}",
    ],
)
def test_a_template_that_draws_at_random_is_refused(draw: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="draws at random"):
        maker_of(chatml("{{ m.content }}", before=draw), tmp_path)
