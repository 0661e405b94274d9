"""Facts about an architecture, on models of the transformers library without memory."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig, Qwen3NextConfig

from hyperagent.architecture import (
    attention_widths,
    decoder_prefix,
    expert_blocks,
    layer_types,
    linear_attention_widths,
    num_experts,
    num_experts_per_token,
    routers,
)

_SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
LLAMA = LlamaConfig(**_SMALL, num_attention_heads=4, num_key_value_heads=2)
MOE = Qwen3MoeConfig(
    **_SMALL, num_attention_heads=2, num_key_value_heads=1, head_dim=12, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, mlp_only_layers=[1],
)  # fmt: skip
NEXT = Qwen3NextConfig(
    **_SMALL, num_attention_heads=2, num_key_value_heads=1, head_dim=12, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, shared_expert_intermediate_size=8, full_attention_interval=4, linear_num_key_heads=1,
    linear_num_value_heads=2, linear_key_head_dim=6, linear_value_head_dim=5,
)  # fmt: skip


@pytest.mark.parametrize("config", [LLAMA, MOE, NEXT], ids=["llama", "qwen3_moe", "qwen3_next"])
def test_a_config_s_facts_are_those_of_its_modules(config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    prefix, layers = decoder_prefix(model), model.get_decoder().layers
    assert model.get_submodule(prefix) is model.get_decoder()
    kinds = layer_types(config)
    assert [hasattr(layer, "linear_attn") for layer in layers] == [kind == "linear_attention" for kind in kinds]
    blocks = {f"{prefix}.layers.{i}.mlp" for i, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}
    assert set(expert_blocks(model)) == blocks
    assert set(routers(model)) == {f"{block}.gate" for block in blocks}
    assert (num_experts(config) > 0) == bool(blocks)
    assert (num_experts_per_token(config) > 0) == bool(blocks)
    query, key = attention_widths(config)
    for layer, kind in zip(layers, kinds, strict=True):
        if kind == "linear_attention":
            keys, values = linear_attention_widths(config)
            assert layer.linear_attn.in_proj_qkvz.out_features == 2 * keys + 2 * values
        else:
            assert (layer.self_attn.k_proj.out_features, layer.self_attn.o_proj.in_features) == (key, query)


def test_the_routers_are_the_modules_that_pick_experts() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MOE)
    assert len(routers(model)) == 3
    assert {tuple(router.weight.shape) for router in routers(model).values()} == {(4, 16)}
