"""What decoder layers of the frozen student keep for their backward pass, from its config alone.

The student's own weights have no gradient, so of a product only an adapter needs the input. The widths are those of
transformers' code around kernels for attention, the convolution and the gated delta rule. A CPU has no kernel for the
last two; what transformers computes instead keeps several times as much. Adapters themselves keep a rank's width, which is
left out.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

_CHUNK = 64
"""Tokens of the gated delta rule's chunks, and so the width of what stands for pairs within one."""


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Of every decoder layer: full_attention or linear_attention."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def mixer_bytes(config: PreTrainedConfig, kind: str, *, element: int, kernels: bool) -> float:
    """Kept of each token by a layer's two norms, which compute in float32, and its attention or Gated DeltaNet.

    Args:
        element: bytes of a number in the student's dtype.
    """
    norms = 4 * 2 * config.hidden_size
    if kind == "linear_attention":
        return norms + _delta_net_bytes(config, element, kernels=kernels)
    return norms + _attention_bytes(config, element)


def mixer_gradient_bytes(config: PreTrainedConfig, kind: str, *, element: int) -> float:
    """Of each token, that a mixer's backward pass holds beside: two gradients of the widest product. An estimate."""
    if kind == "linear_attention":
        keys, values = _delta_net_sizes(config)
        return element * 2 * (2 * keys + 2 * values)
    heads, keys = _attention_sizes(config)
    return element * 2 * (2 * heads + 2 * keys)


def block_bytes(config: PreTrainedConfig, *, element: int) -> float:
    """Kept of each token by a layer's MLP or mixture of experts."""
    if not getattr(config, "num_experts", 0):
        # The gate's product, its activation, and what that is multiplied with.
        return element * 3 * config.intermediate_size
    # Of every expert that a token goes to, the two products, the activation, and the output that a weight multiplies;
    # the block's input, the shared expert's three, and the router's probabilities.
    routed = config.num_experts_per_tok * (3 * config.moe_intermediate_size + config.hidden_size)
    shared = 3 * getattr(config, "shared_expert_intermediate_size", 0)
    return element * (config.hidden_size + routed + shared) + 4 * config.num_experts


def block_gradient_bytes(config: PreTrainedConfig, *, element: int) -> float:
    """Of each token, that a block's passes hold beside: gradients and, of experts, copies in another order. An estimate."""
    if not getattr(config, "num_experts", 0):
        return element * 2 * config.intermediate_size
    return element * config.num_experts_per_tok * 3 * (config.moe_intermediate_size + config.hidden_size)


def _attention_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Widths of queries, and of keys or values."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_size, config.num_key_value_heads * head_size


def _delta_net_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Widths of keys, and of values."""
    return (
        config.linear_num_key_heads * config.linear_key_head_dim,
        config.linear_num_value_heads * config.linear_value_head_dim,
    )


def _attention_bytes(config: PreTrainedConfig, element: int) -> float:
    heads, keys = _attention_sizes(config)
    # x, queries, keys and values as attention takes them, what it gives, and its log-sum-exp.
    kept = element * (config.hidden_size + 2 * heads + 2 * keys) + 4 * config.num_attention_heads
    has_gate = config.model_type == "qwen3_next"
    if config.model_type.startswith("qwen3"):
        # Queries and keys before their norms, in float32. A float32 student's are no copy of those, and q_proj's output
        # then stays whole, with the gate.
        kept += 4 * (heads + keys + (heads if has_gate and element == 4 else 0))
    if has_gate:
        # The output in o_proj's layout, which rotating a part of each head has changed; the gate; what o_proj reads.
        kept += element * 3 * heads
    return kept


def _delta_net_bytes(config: PreTrainedConfig, element: int, *, kernels: bool) -> float:
    keys, values = _delta_net_sizes(config)
    heads, key_size, value_size = (
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
    # x, before and after the convolution, the gated norm before its weight, what out_proj reads; and in float32 the norm's
    # input, the gate and its activation.
    kept = element * (config.hidden_size + 2 * (2 * keys + values) + 2 * values) + 4 * 3 * values
    if kernels:
        # Normalized queries and keys, and of each value head a chunk's matrix and decay.
        return kept + element * (2 * keys + heads * _CHUNK) + 4 * 3 * heads
    # Copies for each value head: of queries and keys before and after normalization, with beta, and with decay; of values
    # before and after; five matrices of each chunk, and the state at its start.
    return kept + 4 * heads * (11 * key_size + 4 * value_size + 5 * _CHUNK + key_size * value_size / _CHUNK)
