"""What a trajectory costs, predicted: a T + b T**2 operations for T tokens of a frozen, recomputed student.

A frozen matrix product is done three times: forward, again in the recomputation, and for the gradient of its input.
Attention is done twice forward, and its backward pass is two and a half times that (FlashAttention-2, arXiv:2307.08691,
section 3.1). Gated DeltaNet's recurrence is linear in T and 3 % of the products around it, so it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

_LINEAR_PASSES = 3.0
_ATTENTION_PASSES = 4.5


@dataclass(frozen=True)
class StepCost:
    """Operations of training on one trajectory."""

    per_token: float
    per_token_squared: float

    @classmethod
    def of(cls, decoder: nn.Module, config: PreTrainedConfig) -> StepCost:
        """From the decoder's parameters, which may lie on the meta device or be sharded, and its text config."""
        share = getattr(config, "num_experts_per_tok", 0) / (getattr(config, "num_experts", 0) or 1)
        active = sum(
            p.numel() * (share if ".experts." in name else 1)
            for name, p in decoder.named_parameters()
            if p.dim() > 1 and not name.startswith("embed_tokens.")
        )
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        heads_size = config.num_attention_heads * (
            getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
        )
        # Scores and sums, 2 operations per product each, for half of all pairs.
        attention = 2 * heads_size * sum(kind != "linear_attention" for kind in kinds)
        return cls(_LINEAR_PASSES * 2 * active, _ATTENTION_PASSES * attention)

    def __call__(self, num_tokens: int) -> float:
        return self.per_token * num_tokens + self.per_token_squared * num_tokens**2
