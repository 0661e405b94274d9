"""Building blocks of encoder and generator: pre-normalized residual attention and MLP.

Legend of shape suffixes: B samples, Q queries, C context vectors, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a projection without bias whose outputs have the same scale as its inputs.

    The weights have a standard deviation of 1/sqrt(in). PyTorch's default is 1/sqrt(3 in). A prompt's contribution passes
    about ten projections, so with that default it would reach the generator's features a hundred times smaller than the
    queries, which are the same for every prompt and would be learned first.
    """
    made = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(made.weight, std=1 / math.sqrt(in_features))
    return made


class Attention(nn.Module):
    """Multi-head attention from queries [B, Q, D] to a context [B, C, D]; pre-normalized, residual."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_query = nn.RMSNorm(width)
        self.norm_context = nn.RMSNorm(width)
        self.query = linear(width, width)
        self.key = linear(width, width)
        self.value = linear(width, width)
        self.out = linear(width, width)

    def forward(
        self,
        x_BQD: Tensor,
        context_BCD: Tensor,
        mask_BC: Tensor | None = None,
        places_CD: Tensor | None = None,
    ) -> Tensor:
        """Return x plus the attention's output, shape [B, Q, D].

        Args:
            mask_BC: True where a context vector may be read.
            places_CD: position features of the context vectors, added to keys and not to values (DETR, arXiv:2005.12872,
                section 3.2), so that they decide what is read without being read themselves.
        """

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        context_BCD = self.norm_context(context_BCD)
        placed_BCD = context_BCD if places_CD is None else context_BCD + places_CD
        mask = None if mask_BC is None else mask_BC[:, None, None, :]
        mixed = F.scaled_dot_product_attention(
            heads(self.query(self.norm_query(x_BQD))),
            heads(self.key(placed_BCD)),
            heads(self.value(context_BCD)),
            attn_mask=mask,
        )
        return x_BQD + self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Pre-normalized residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the MLP's output, computed at every position independently."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Return position features [length, width] (Attention Is All You Need, arXiv:1706.03762, section 3.5)."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angle = torch.arange(length, device=device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
