"""Tests of the plugin's parts that need no engine: names, conditions, checks of adapters, CPU kernels, and unknown releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from hyperagent.errors import ConfigError, CorruptRecord, InvalidRequest
from hyperagent.http.adapter_models import PromptBody
from hyperagent.model.adapter import LoRAPair
from hyperagent.model.peft_io import encode_adapter
from hyperagent_vllm import plugin
from hyperagent_vllm.adapters import number_of
from hyperagent_vllm.conversation import prompt_of
from hyperagent_vllm.cpu_kernels import correct_cpu_kernels
from hyperagent_vllm.settings import PluginSettings, read_settings
from hyperagent_vllm.staging import require_sound

TOOL = {
    "type": "function",
    "function": {"name": "run", "parameters": {"type": "object", "properties": {"command": {"type": "string"}}}},
}
MESSAGES: list[Any] = [
    {"role": "system", "content": "You mend code."},
    {"role": "user", "content": [{"type": "text", "text": "Mend "}, {"type": "text", "text": "it."}]},
    {"role": "assistant", "content": "I look."},
    {"role": "user", "content": "And then?"},
]
WHOLE = PromptBody(prompt="Mend it.", system="You mend code.", tools=[TOOL])


@pytest.mark.parametrize("num_messages", [2, 4])
def test_every_turn_of_a_conversation_has_the_same_condition(num_messages: int) -> None:
    request = ChatCompletionRequest(model="hyper:auto", messages=MESSAGES[:num_messages], tools=[TOOL])
    assert prompt_of(request, ("system", "tools", "task")) == WHOLE
    # What the hypernetwork does not read is not sent, and what a conversation does not have is null.
    assert prompt_of(request, ("task",)).model_fields_set == {"prompt"}
    bare = ChatCompletionRequest(model="hyper:auto", messages=MESSAGES[1:2])
    assert prompt_of(bare, ("system", "tools", "task")) == PromptBody(prompt="Mend it.", system=None, tools=None)


def test_the_condition_of_the_other_interfaces() -> None:
    assert prompt_of(CompletionRequest(model="hyper:auto", prompt="Mend it."), ("task",)).prompt == "Mend it."
    for given in ("Mend it.", [{"role": "user", "content": "Mend it."}]):
        request = ResponsesRequest(model="hyper:auto", input=given, instructions="You mend code.")
        assert prompt_of(request, ("system", "task")) == PromptBody(prompt="Mend it.", system="You mend code.")


@pytest.mark.parametrize("request_", [
    ChatCompletionRequest(model="hyper:auto", messages=[{"role": "system", "content": "You mend code."}]),
    CompletionRequest(model="hyper:auto", prompt=[1, 2, 3]),
])  # fmt: skip
def test_a_request_without_text_has_no_condition(request_: Any) -> None:
    with pytest.raises(InvalidRequest, match="needs a user message with text"):
        prompt_of(request_, ("task",))


def test_a_number_is_a_function_of_the_id() -> None:
    assert number_of("ffffffff" + "0" * 56) == 0x7FFFFFFF
    assert number_of("0" * 64) == number_of("80000000" + "0" * 56) == 1


SHAPES = {"model.layers.0.self_attn.q_proj": (6, 4), "model.layers.0.mlp.up_proj": (8, 4)}


def changed(change: Callable[[dict[str, torch.Tensor]], Any], *, rank: int = 2) -> tuple[bytes, bytes]:
    torch.manual_seed(0)
    weights = {name: LoRAPair(torch.randn(rank, i), torch.randn(o, rank)) for name, (o, i) in SHAPES.items()}
    files = encode_adapter(weights, base_model="student", alpha=4.0, origin={})
    tensors = load(files.model)
    change(tensors)
    return save(tensors, metadata={"format": "pt"}), files.config


Q_A, Q_B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.update({Q_A: t[Q_A][:, :3].contiguous()}), "do not fit the student's 6 x 4"),
        (lambda t: t.update({Q_B: t[Q_B][:4].contiguous()}), "do not fit the student's 6 x 4"),
        (lambda t: t[Q_B].fill_(float("nan")), "are not finite"),
        (lambda t: t[Q_A].fill_(float("inf")), "are not finite"),
        (lambda t: [x.zero_() for name, x in t.items() if "lora_B" in name], "changes nothing"),
        (lambda t: t.pop(Q_A), "one pair of factors"),
        (lambda t: t.update({Q_A.replace("0.self", "9.self"): t.pop(Q_A), Q_B.replace("0.self", "9.self"): t.pop(Q_B)}),
         "changes model.layers.9.self_attn.q_proj, which the student does not have"),
    ],
)  # fmt: skip
def test_an_adapter_that_the_engine_would_misapply_is_refused(change: Callable[..., Any], why: str) -> None:
    model, config = changed(change)
    with pytest.raises(CorruptRecord, match=why):
        require_sound(model, config, SHAPES, max_rank=8)


def test_a_sound_adapter_is_accepted_up_to_the_engines_rank() -> None:
    model, config = changed(lambda _: None)
    require_sound(model, config, SHAPES, max_rank=2)
    with pytest.raises(CorruptRecord, match="has rank 2, the engine takes at most 1"):
        require_sound(model, config, SHAPES, max_rank=1)
    for broken in (b"", model[:-5]):
        with pytest.raises(CorruptRecord, match="cannot be read"):
            require_sound(broken, config, SHAPES, max_rank=8)
    with pytest.raises(CorruptRecord, match="cannot be read"):
        require_sound(model, json.dumps({}).encode(), SHAPES, max_rank=8)


def test_requests_without_an_adapter_stay_without_one_in_a_mixed_batch() -> None:
    correct_cpu_kernels()
    correct_cpu_kernels()
    from vllm.lora.punica_wrapper import punica_cpu

    torch.manual_seed(0)
    a, b, inputs = torch.randn(2, 1, 3, 5), torch.randn(2, 1, 4, 3), torch.randn(3, 5)
    indices = torch.tensor([-1, 0, 1])
    shrunk, expanded = torch.zeros(3, 3), torch.ones(3, 4)
    lengths = torch.ones(3, dtype=torch.long)
    punica_cpu.sgmv_shrink(inputs, a, shrunk, lengths, lengths, indices, 3, 1, 3, 2.0)
    punica_cpu.sgmv_expand(shrunk, b, expanded, lengths, lengths, indices, 3, 1, 3, True)
    expected = torch.stack([torch.zeros(4), *(2 * b[n, 0] @ (a[n, 0] @ inputs[n + 1]) for n in range(2))]) + 1
    torch.testing.assert_close(expanded, expected)


def test_without_a_service_the_plugin_does_nothing_and_wrong_settings_are_named() -> None:
    assert read_settings({}) is None
    assert read_settings({"HYPERAGENT_VLLM_MAX_LOADS": "2"}) is None
    found = read_settings({"HYPERAGENT_VLLM_SERVICE": "http://x", "HYPERAGENT_VLLM_MAX_LOADS": "2"})
    assert found is not None
    assert found.max_loads == 2
    for name, value in (("ON_FAILURE", "guess"), ("MAX_LOADS", "0"), ("SERVICES", "x")):
        with pytest.raises(ConfigError, match="the environment"):
            read_settings({"HYPERAGENT_VLLM_SERVICE": "http://x", f"HYPERAGENT_VLLM_{name}": value})


async def _another_signature(_self: Any, _request: Any, _raw_request: Any) -> None: ...


def test_another_release_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.entrypoints.serve.engine.serving import BaseServing

    plugin.require_known_vllm()
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_USE_RUST_FRONTEND", "1")
        with pytest.raises(ConfigError, match="Python frontend only"):
            plugin.require_known_vllm()
    with monkeypatch.context() as patch:
        patch.setattr(vllm, "__version__", "0.33.0")
        with pytest.raises(ConfigError, match=r"was tested with vLLM 0\.32, this is 0\.33\.0"):
            plugin.require_known_vllm()
    monkeypatch.setattr(BaseServing, "_check_model", _another_signature)
    with pytest.raises(ConfigError, match="was tested with"):
        plugin.require_known_vllm()


@pytest.mark.parametrize("policy", ["refuse", "base"])
async def test_without_the_service_the_policy_decides(
    policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.entrypoints.serve.engine.serving import BaseServing

    monkeypatch.setenv("HYPERAGENT_TOKEN", "secret")
    monkeypatch.setattr(BaseServing, "_check_model", BaseServing._check_model)  # restored afterwards
    service = {"service": "http://127.0.0.1:1", "on_failure": policy, "staging": tmp_path}
    plugin._patch(PluginSettings.model_validate(service))
    serving = BaseServing.__new__(BaseServing)
    serving.models = SimpleNamespace(
        engine_client=None, base_model_paths=[SimpleNamespace(name="student")], lora_requests={}
    )  # type: ignore[assignment]
    request = ChatCompletionRequest(model="hyper:auto", messages=MESSAGES)
    refusal = await serving._check_model(request)
    if policy == "base":
        assert (refusal, request.model) == (None, "student")
    else:
        assert refusal is not None
        assert refusal.error.code == 503
        assert "127.0.0.1:1" in refusal.error.message
