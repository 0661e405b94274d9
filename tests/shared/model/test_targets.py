"""Test which layers are found in which student and what discovery refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from hyperagent.errors import ConfigError
from hyperagent.model.config import LayerInfo
from hyperagent.model.targets import ARCHITECTURES, discover_target_layers, num_adapter_parameters

ATTENTION = tuple(f"self_attn.{p}_proj" for p in "qkvo")
DELTA = ("linear_attn.in_proj_qkvz", "linear_attn.out_proj")
SHARED_EXPERT = tuple(f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down"))


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def real_student() -> PreTrainedModel:
    """Return a model of Qwen3-Coder-Next's architecture without storage."""
    return on_meta(
        Qwen3NextConfig(
            vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=2,
            head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
            linear_value_head_dim=128, linear_conv_kernel_dim=4, moe_intermediate_size=512,
            shared_expert_intermediate_size=512, intermediate_size=5120, num_experts=512, num_experts_per_tok=10,
            full_attention_interval=4, max_position_embeddings=262_144, tie_word_embeddings=False,
        )
    )  # fmt: skip


@pytest.fixture
def tiny_student() -> PreTrainedModel:
    return on_meta(
        Qwen3NextConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=16,
            linear_value_head_dim=16, moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=4,
            num_experts_per_tok=2, full_attention_interval=4, tie_word_embeddings=False,
        )
    )  # fmt: skip


def test_the_real_student_has_the_parameters_of_its_name(real_student: PreTrainedModel) -> None:
    assert sum(p.numel() for p in real_student.parameters()) == 79_674_391_296


def test_every_layer_of_the_real_student_is_reached_by_its_true_names(real_student: PreTrainedModel) -> None:
    found = discover_target_layers(real_student)
    attention = range(3, 48, 4)
    assert [layer.name for layer in found] == [
        f"model.layers.{i}.{path}" for i in range(48) for path in (ATTENTION if i in attention else DELTA)
    ]
    assert Counter((layer.kind, layer.in_features, layer.out_features) for layer in found) == {
        ("linear_attn.in_proj_qkvz", 2048, 12_288): 36,
        ("linear_attn.out_proj", 4096, 2048): 36,
        ("self_attn.q_proj", 2048, 8192): 12,
        ("self_attn.k_proj", 2048, 512): 12,
        ("self_attn.v_proj", 2048, 512): 12,
        ("self_attn.o_proj", 4096, 2048): 12,
    }
    modules = dict(real_student.named_modules())
    assert all(modules[layer.name].weight.shape == (layer.out_features, layer.in_features) for layer in found)
    assert {layer.depth for layer in found} == set(range(48))


def test_the_size_of_an_adapter_of_the_real_student(real_student: PreTrainedModel) -> None:
    default = ARCHITECTURES["qwen3_next"].targets
    sizes = {
        (): 15_925_248,
        ("linear_attn.in_proj_ba",): 17_141_760,
        SHARED_EXPERT: 21_823_488,
    }
    for more, expected in sizes.items():
        layers = discover_target_layers(real_student, [*default, *more])
        assert num_adapter_parameters(layers, rank=16) == expected, more
        assert len(layers) == 120 + {"linear_attn.in_proj_ba": 36}.get("".join(more), 48 * len(more))


@pytest.mark.parametrize("make", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig])
def test_other_students(make: Callable[..., PretrainedConfig]) -> None:
    config = make(
        vocab_size=32, hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    found = discover_target_layers(on_meta(config))
    assert found[:4] == [
        LayerInfo("model.layers.0.self_attn.q_proj", 32, 32),
        LayerInfo("model.layers.0.self_attn.k_proj", 32, 16),
        LayerInfo("model.layers.0.self_attn.v_proj", 32, 16),
        LayerInfo("model.layers.0.self_attn.o_proj", 32, 32),
    ]
    assert len(found) == 8
    if make is not Qwen3MoeConfig:
        mlp = discover_target_layers(on_meta(config), ["mlp.gate_proj", "mlp.down_proj"])
        assert [(layer.in_features, layer.out_features) for layer in mlp] == 2 * [(32, 40), (40, 32)]


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["self_attn.q_proj", "self_attn.k_proj"], r"decoder layer 0 of the qwen3_next student has none of the targets"),
        ([*ATTENTION, "linear_attn.in_proj_qkv"], r"has no projection linear_attn\.in_proj_qkv that can be adapted"),
        ([*ATTENTION, "q_proj"], "has no projection q_proj that can be adapted; choose from self_attn.q_proj"),
        ([*ATTENTION, "linear_attn.conv1d"], r"has no projection linear_attn\.conv1d that can be adapted"),
        ([*ATTENTION, *DELTA, "mlp.gate"], r"mlp\.gate is never adapted: .* routing must stay that of the student"),
        ([*ATTENTION, *DELTA, "mlp.shared_expert_gate"], r"shared_expert_gate is never adapted: it decides which"),
        ([*ATTENTION, *DELTA, "mlp.experts.gate_up_proj"], r"never adapted: the routed experts are fused"),
        ([*ATTENTION, *DELTA, "mlp.experts.3.down_proj"], r"never adapted: the routed experts are fused"),
        ([*ATTENTION, *DELTA, "self_attn.q_proj"], r"self_attn\.q_proj is listed twice"),
        ([], "the list of targets is empty"),
    ],
)  # fmt: skip
def test_targets_that_are_refused(targets: list[str], reason: str, tiny_student: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        discover_target_layers(tiny_student, targets)
    assert "\n" not in str(refused.value)


def test_a_target_that_this_student_has_nowhere_is_refused() -> None:
    config = Qwen3NextConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        layer_types=["full_attention"], num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"no decoder layer .* has linear_attn\.in_proj_qkvz, linear_attn\.out_proj"):
        discover_target_layers(on_meta(config))


def narrow_query(attention: Any) -> None:
    """Remove the output gate, as in other attention layers, which halves the outputs."""
    attention.q_proj = nn.Linear(32, 64, bias=False, device="meta")


def lose_key(attention: Any) -> None:
    del attention.k_proj


def quantize_output(attention: Any) -> None:
    class Quantized(nn.Linear):
        pass

    attention.o_proj = Quantized(64, 32, bias=False, device="meta")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (narrow_query, r"layers\.3\.self_attn\.q_proj maps 32 to 64 features, but .* config implies 32 to 128"),
        (lose_key, r"the student lacks model\.layers\.3\.self_attn\.k_proj"),
        (quantize_output, r"layers\.3\.self_attn\.o_proj is a Quantized, not a plain linear layer"),
    ],
)
def test_a_student_that_is_not_what_its_config_says_is_refused(
    damage: Callable[[Any], None], reason: str, tiny_student: PreTrainedModel
) -> None:
    assert len(discover_target_layers(tiny_student)) == 10
    damage(tiny_student.get_decoder().layers[3].self_attn)
    with pytest.raises(ConfigError, match=reason):
        discover_target_layers(tiny_student)


def test_an_unknown_architecture_is_refused(tiny_student: PreTrainedModel) -> None:
    tiny_student.config.model_type = "unheard_of"
    with pytest.raises(ConfigError, match="students of type 'unheard_of' are not supported"):
        discover_target_layers(tiny_student, ["self_attn.q_proj"])


def test_a_layer_knows_its_place_by_its_name() -> None:
    layer = LayerInfo("model.layers.17.mlp.shared_expert.up_proj", 4, 4)
    assert (layer.depth, layer.kind) == (17, "mlp.shared_expert.up_proj")
    with pytest.raises(ConfigError, match="'lm_head' is not a module of a decoder layer"):
        _ = LayerInfo("lm_head", 4, 4).kind
