"""What encoder and generator are built of: pre-normalised residual attention and MLP.

Legend of shape suffixes: B samples, Q queries, C context vectors, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention from queries [B, Q, D] to a context [B, C, D]; pre-normalised, residual."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_query = nn.RMSNorm(width)
        self.norm_context = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BQD: Tensor, context_BCD: Tensor, mask_BC: Tensor | None = None) -> Tensor:
        """x plus what it reads; `mask_BC` is True where a context vector may be read."""

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = self.key_value(self.norm_context(context_BCD)).chunk(2, dim=-1)
        mask = None if mask_BC is None else mask_BC[:, None, None, :]
        mixed = F.scaled_dot_product_attention(
            heads(self.query(self.norm_query(x_BQD))), heads(key), heads(value), attn_mask=mask
        )
        return x_BQD + self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Pre-normalised residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x plus the MLP's output, at every position by itself."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """[length, width] position features (Attention Is All You Need, arXiv:1706.03762, section 3.5)."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angle = torch.arange(length, device=device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
