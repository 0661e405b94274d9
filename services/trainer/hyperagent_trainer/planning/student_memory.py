"""Compute what decoder layers of the frozen student keep for their backward pass from its config.

The student's own weights have no gradient, so only an adapter needs the input of a matrix product. The widths follow
transformers' code around the kernels for attention, the convolution and the gated delta rule. A CPU has no kernel for the
last two, and transformers' fallback keeps several times as much. What adapters keep, a rank's width, is left out.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from hyperagent.architecture import (
    LINEAR_ATTENTION,
    LINEAR_ATTENTION_CHUNK,
    attention_widths,
    linear_attention_widths,
    num_experts,
    num_experts_per_token,
)


def mixer_bytes(config: PreTrainedConfig, kind: str, *, element: int, kernels: bool) -> float:
    """Return the bytes per token kept by a layer's two norms, which compute in float32, and its mixer.

    Args:
        kind: type of the layer, whose mixer is attention or a Gated DeltaNet.
        element: bytes of a number in the student's dtype.
        kernels: whether the GPU kernels are used.
    """
    norms = 4 * 2 * config.hidden_size
    if kind == LINEAR_ATTENTION:
        return norms + _delta_net_bytes(config, element, kernels=kernels)
    return norms + _attention_bytes(config, element)


def mixer_gradient_bytes(config: PreTrainedConfig, kind: str, *, element: int) -> float:
    """Estimate the extra bytes per token held during a mixer's backward pass: two gradients of the widest product."""
    if kind == LINEAR_ATTENTION:
        keys, values = linear_attention_widths(config)
        return element * 2 * (2 * keys + 2 * values)
    heads, keys = attention_widths(config)
    return element * 2 * (2 * heads + 2 * keys)


def block_bytes(config: PreTrainedConfig, *, element: int) -> float:
    """Return the bytes per token kept by a layer's MLP or mixture of experts."""
    if not num_experts(config):
        # The gate's product, its activation, and the factor that multiplies it.
        return element * 3 * config.intermediate_size
    # For every expert that a token goes to: the two products, the activation, and the output before its weight. In addition
    # the block's input, three tensors of the shared expert, and the router's probabilities.
    routed = num_experts_per_token(config) * (3 * config.moe_intermediate_size + config.hidden_size)
    shared = 3 * getattr(config, "shared_expert_intermediate_size", 0)
    return element * (config.hidden_size + routed + shared) + 4 * num_experts(config)


def block_gradient_bytes(config: PreTrainedConfig, *, element: int) -> float:
    """Estimate the extra bytes per token held during a block's passes: gradients and, for experts, reordered copies."""
    if not num_experts(config):
        return element * 2 * config.intermediate_size
    return element * num_experts_per_token(config) * 3 * (config.moe_intermediate_size + config.hidden_size)


def _attention_bytes(config: PreTrainedConfig, element: int) -> float:
    heads, keys = attention_widths(config)
    # x, the attention's queries, keys and values, its output, and its log-sum-exp.
    kept = element * (config.hidden_size + 2 * heads + 2 * keys) + 4 * config.num_attention_heads
    has_gate = config.model_type == "qwen3_next"
    if config.model_type.startswith("qwen3"):
        # Queries and keys before their norms, in float32. With a float32 student these are no copies, and q_proj's output is
        # then kept whole, with the gate.
        kept += 4 * (heads + keys + (heads if has_gate and element == 4 else 0))
    if has_gate:
        # The output in o_proj's layout, which rotating a part of each head has changed; the gate; o_proj's input.
        kept += element * 3 * heads
    return kept


def _delta_net_bytes(config: PreTrainedConfig, element: int, *, kernels: bool) -> float:
    keys, values = linear_attention_widths(config)
    heads, key_size, value_size = (
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
    # x, input and output of the convolution, the gated norm before its weight, out_proj's input; and in float32 the norm's
    # input, the gate and its activation.
    kept = element * (config.hidden_size + 2 * (2 * keys + values) + 2 * values) + 4 * 3 * values
    if kernels:
        # Normalized queries and keys, and for each value head a chunk's matrix and decay.
        return kept + element * (2 * keys + heads * LINEAR_ATTENTION_CHUNK) + 4 * 3 * heads
    # Copies for each value head: of queries and keys before and after normalization, with beta, and with decay; of values
    # before and after; five matrices of each chunk, and the state at its start.
    return kept + 4 * heads * (
        11 * key_size + 4 * value_size + 5 * LINEAR_ATTENTION_CHUNK + key_size * value_size / LINEAR_ATTENTION_CHUNK
    )
