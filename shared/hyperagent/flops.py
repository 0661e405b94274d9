"""Count the floating-point operations of a language model, for plans and for the schedule of training steps.

A multiplication and an addition count as two operations. With W parameters in the products of every token, A = query
heads x head dimension, L layers of full attention and R operations of recurrent state per token, a forward pass over a
trajectory of T tokens with N rows of the head takes

    linear     2 W T
    attention  2 A T^2 L      (scores and values, half of the square each, since a token does not see later ones)
    recurrent  R T
    head       2 H N          (H: hidden size x vocabulary)

A frozen student's backward pass has no products for weight gradients, and its head's gradient is computed in the forward
pass. In units of forward passes, training takes

                                linear   attention   recurrent   head
    `FROZEN`, work                 2         3           3         2     a product has two operands with gradients in attention
    `EXECUTED`, recomputing        3         4.5         4.5       2     a kernel's backward pass is 2.5 (arXiv:2307.08691, 3.1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hyperagent.architecture import (
    LINEAR_ATTENTION,
    LINEAR_ATTENTION_CHUNK,
    attention_widths,
    layer_types,
    num_experts,
    num_experts_per_token,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

Lengths = NDArray[np.int64]
Flops = NDArray[np.float64]

FROZEN: Mapping[str, float] = MappingProxyType({"linear": 2.0, "attention": 3.0, "recurrent": 3.0, "head": 2.0})
"""Cost of training in forward passes, without recomputation."""
EXECUTED: Mapping[str, float] = MappingProxyType({"linear": 3.0, "attention": 4.5, "recurrent": 4.5, "head": 2.0})
"""Cost of training in forward passes when every decoder layer is recomputed in the backward pass."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide the cost of a model's matrix products."""

    name: str
    num_parameters: float
    linear_parameters: float
    """W: parameters in the products of one token; in a mixture of experts, only those of the experts it is routed to."""
    attention_width: int
    """A: query heads x head dimension."""
    num_attention_layers: int
    """L: layers of full attention."""
    head_parameters: int
    """H: hidden size x vocabulary."""
    recurrent_flops: float = 0.0
    """R: operations per token in the forward pass of all layers with a recurrent state."""

    @classmethod
    def of(cls, decoder: nn.Module, config: PreTrainedConfig) -> ModelShape:
        """Return the shape of a decoder, which may be on the meta device or sharded, given its text config."""
        share = num_experts_per_token(config) / (num_experts(config) or 1)
        linear = sum(
            p.numel() * (share if ".experts." in name else 1)
            for name, p in decoder.named_parameters()
            if p.dim() > 1 and not name.startswith("embed_tokens.")
        )
        kinds = layer_types(config)
        num_linear = kinds.count(LINEAR_ATTENTION)
        recurrent = 0.0
        if num_linear:
            recurrent = num_linear * delta_rule_flops(
                value_heads=config.linear_num_value_heads,
                key_size=config.linear_key_head_dim,
                value_size=config.linear_value_head_dim,
            )
        head = config.hidden_size * config.vocab_size
        tied = getattr(config, "tie_word_embeddings", False)
        return cls(
            name=str(config.model_type),
            num_parameters=sum(p.numel() for p in decoder.parameters()) + (0 if tied else head),
            linear_parameters=linear,
            attention_width=attention_widths(config)[0],
            num_attention_layers=len(kinds) - num_linear,
            head_parameters=head,
            recurrent_flops=recurrent,
        )

    def forward_flops(self, num_tokens: Lengths, num_rows: Lengths) -> dict[str, Flops]:
        """Return the operations of a forward pass by kind, each float64 of shape [n].

        Args:
            num_tokens: tokens of each trajectory, shape [n].
            num_rows: rows of the head of each trajectory, shape [n].
        """
        tokens, rows = num_tokens.astype(np.float64), num_rows.astype(np.float64)
        return {
            "linear": 2 * self.linear_parameters * tokens,
            "attention": 2.0 * self.attention_width * self.num_attention_layers * tokens**2,
            "recurrent": self.recurrent_flops * tokens,
            "head": 2.0 * self.head_parameters * rows,
        }

    def training_flops(self, num_tokens: Lengths, num_rows: Lengths, passes: Mapping[str, float]) -> dict[str, Flops]:
        """Return the operations of a frozen student's forward and backward pass; `passes` is `FROZEN` or `EXECUTED`."""
        forward = self.forward_flops(num_tokens, num_rows)
        return {kind: passes[kind] * flops for kind, flops in forward.items()}


def delta_rule_flops(*, value_heads: int, key_size: int, value_size: int) -> float:
    """Return the operations of the gated delta rule per token and layer, forward, in chunks of 64 tokens.

    There are three products with the state [key_size, value_size] and five within a chunk: keys with keys, queries with
    keys, the chunk's triangular system with values and with keys, and its attention with values.
    """
    return 2.0 * value_heads * (3 * key_size * value_size + LINEAR_ATTENTION_CHUNK * (3 * key_size + 2 * value_size))
