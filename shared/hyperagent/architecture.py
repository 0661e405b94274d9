"""Derive facts about a language model's architecture that its config or modules do not state directly.

A config is the text config of transformers (`config.get_text_config()`); a model may be on the meta device or sharded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

FULL_ATTENTION = "full_attention"
LINEAR_ATTENTION = "linear_attention"

LINEAR_ATTENTION_CHUNK = 64
"""Tokens per chunk in the kernels of the gated delta rule and in its reference implementation."""


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Return the kind of each decoder layer's mixer, such as `FULL_ATTENTION` or `LINEAR_ATTENTION`."""
    return list(getattr(config, "layer_types", None) or [FULL_ATTENTION] * config.num_hidden_layers)


def head_dim(config: PreTrainedConfig) -> int:
    """Return the size of one head of softmax attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def num_key_value_heads(config: PreTrainedConfig) -> int:
    """Return the number of key-value heads, which equals the number of query heads unless they are grouped."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def attention_widths(config: PreTrainedConfig) -> tuple[int, int]:
    """Return two widths of softmax attention over all heads: of its queries, and of its keys or values."""
    size = head_dim(config)
    return config.num_attention_heads * size, num_key_value_heads(config) * size


def linear_attention_widths(config: PreTrainedConfig) -> tuple[int, int]:
    """Return two widths of a Gated DeltaNet layer over all heads: of its keys (or queries), and of its values."""
    return (
        config.linear_num_key_heads * config.linear_key_head_dim,
        config.linear_num_value_heads * config.linear_value_head_dim,
    )


def num_experts(config: PreTrainedConfig) -> int:
    """Return the number of routed experts in each mixture of experts; 0 for a dense model."""
    return getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0) or 0


def num_experts_per_token(config: PreTrainedConfig) -> int:
    """Return the number of experts that each token is routed to; 0 for a dense model."""
    return config.num_experts_per_tok if num_experts(config) else 0


def decoder_prefix(model: PreTrainedModel) -> str:
    """Return the name of the decoder among the model's modules, such as "model"."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def expert_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the mixture-of-experts blocks by name: the modules that own a router and routed experts."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "experts") and hasattr(m, "gate")}


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the routers of the mixture-of-experts blocks, by name."""
    return {f"{name}.gate": block.get_submodule("gate") for name, block in expert_blocks(model).items()}
