"""Predict the cost of a trajectory: a T + b T**2 operations for T tokens of a frozen student with recomputation.

The operations are those that `hyperagent.flops` counts, without the head's: trajectories are scheduled by their length,
and the supervised rows take only 1 to 3 % of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from hyperagent.flops import EXECUTED, ModelShape


@dataclass(frozen=True)
class StepCost:
    """Operations of training on one trajectory: call it with the number of tokens."""

    per_token: float
    """Operations that grow with the number of tokens."""
    per_token_squared: float
    """Operations that grow with its square."""

    @classmethod
    def of(cls, decoder: nn.Module, config: PreTrainedConfig) -> StepCost:
        """Derive the cost from the decoder's parameters, which may be on the meta device or sharded, and its text config."""
        shape = ModelShape.of(decoder, config)
        return cls(
            per_token=EXECUTED["linear"] * 2 * shape.linear_parameters + EXECUTED["recurrent"] * shape.recurrent_flops,
            per_token_squared=EXECUTED["attention"] * 2 * shape.attention_width * shape.num_attention_layers,
        )

    def __call__(self, num_tokens: int) -> float:
        return self.per_token * num_tokens + self.per_token_squared * num_tokens**2
