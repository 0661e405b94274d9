"""What a trajectory costs, predicted: a T + b T**2 operations for T tokens of a frozen, recomputed student.

The operations are those that `hyperagent.flops` counts, without the head's: a trajectory's supervised rows take 1 to
3 % of its step, and its length is what it is scheduled by.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from hyperagent.flops import EXECUTED, ModelShape


@dataclass(frozen=True)
class StepCost:
    """Operations of training on one trajectory."""

    per_token: float
    per_token_squared: float

    @classmethod
    def of(cls, decoder: nn.Module, config: PreTrainedConfig) -> StepCost:
        """From the decoder's parameters, which may lie on the meta device or be sharded, and its text config."""
        shape = ModelShape.of(decoder, config)
        return cls(
            per_token=EXECUTED["linear"] * 2 * shape.linear_parameters + EXECUTED["recurrent"] * shape.recurrent_flops,
            per_token_squared=EXECUTED["attention"] * 2 * shape.attention_width * shape.num_attention_layers,
        )

    def __call__(self, num_tokens: int) -> float:
        return self.per_token * num_tokens + self.per_token_squared * num_tokens**2
