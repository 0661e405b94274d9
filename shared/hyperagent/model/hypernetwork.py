"""The hypernetwork: one prompt in, one LoRA adapter for every target layer out, in one forward pass.

    prompt embeddings [B, P, E] ──> PromptEncoder ──> latents [B, L, D] ──> ShapeGroupedLoRAGenerator ──> A, B per layer

Legend of shape suffixes: B samples, P prompt tokens, E embedding size of the student, L latents, D width,
M target layers, R rank, I and O a layer's input and output size.

The encoder pools by cross-attention from a fixed set of latents (Perceiver IO, arXiv:2107.14795), so its cost is
linear in P. The generator asks one query per (layer, rank) and turns each answer into one row of A and one column
of B; layers of equal shape share a head, so parameters grow with the number of shapes, not of layers.

At initialisation B's heads are zero, so the adapted student equals the student bit for bit whatever the prompt,
and the first gradient already depends on the prompt. A's heads give entries with the standard deviation PEFT
starts A with, 1/sqrt(3 I). Both read a feature of unit L2 norm, which keeps an Adam step's effect on the delta
independent of D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from hyperagent.config import StrictModel
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.targets import LayerInfo


class HyperNetworkConfig(StrictModel):
    """Shape of the hypernetwork."""

    width: int = Field(256, ge=16, multiple_of=16)
    """D, size of the hidden vectors."""
    num_latents: int = Field(32, ge=1)
    """L, vectors the prompt is pooled into."""
    encoder_blocks: int = Field(2, ge=1)
    """Perceiver blocks of the encoder."""
    generator_blocks: int = Field(2, ge=1)
    """Cross-attention blocks of the generator."""
    num_heads: int = Field(4, ge=1)
    """Attention heads; must divide the width."""
    rank: int = Field(16, ge=1)
    """R, rank of the generated adapters."""
    alpha: float = Field(32.0, gt=0)
    """LoRA's alpha; the delta is scaled by alpha / rank, as in PEFT."""

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> HyperNetworkConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        return self

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class _Attention(nn.Module):
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
        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = self.key_value(self.norm_context(context_BCD)).chunk(2, dim=-1)
        mask = None if mask_BC is None else mask_BC[:, None, None, :]
        mixed = F.scaled_dot_product_attention(
            heads(self.query(self.norm_query(x_BQD))), heads(key), heads(value), attn_mask=mask
        )
        return x_BQD + self.out(mixed.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """Pre-normalised residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class _EncoderBlock(nn.Module):
    """Latents read the prompt, mix among themselves, and think."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.read = _Attention(width, num_heads)
        self.mix = _Attention(width, num_heads)
        self.think = _FeedForward(width)

    def forward(self, latents_BLD: Tensor, tokens_BPD: Tensor, mask_BP: Tensor) -> Tensor:
        latents_BLD = self.read(latents_BLD, tokens_BPD, mask_BP)
        thought: Tensor = self.think(self.mix(latents_BLD, latents_BLD))
        return thought


class _GeneratorBlock(nn.Module):
    """Queries read the latents and think."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.read = _Attention(width, num_heads)
        self.think = _FeedForward(width)

    def forward(self, queries_BQD: Tensor, latents_BLD: Tensor) -> Tensor:
        thought: Tensor = self.think(self.read(queries_BQD, latents_BLD))
        return thought


class PromptEncoder(nn.Module):
    """Pools a prompt of any length into L latents."""

    def __init__(self, config: HyperNetworkConfig, embedding_size: int) -> None:
        super().__init__()
        width = config.width
        self.norm_input = nn.RMSNorm(embedding_size)
        self.input = nn.Linear(embedding_size, width, bias=False)
        self.latents = nn.Parameter(torch.randn(config.num_latents, width) / math.sqrt(width))
        self.blocks = nn.ModuleList(_EncoderBlock(width, config.num_heads) for _ in range(config.encoder_blocks))

    def forward(self, embeddings_BPE: Tensor, mask_BP: Tensor) -> Tensor:
        """Latents [B, L, D] of prompt embeddings; `mask_BP` is True at real tokens, of which each row has one at least."""
        tokens_BPD = self.input(self.norm_input(embeddings_BPE))
        # The table's rows carry no order, so positions are added (sinusoidal: defined for every length).
        tokens_BPD = tokens_BPD + _sinusoids(tokens_BPD.shape[1], tokens_BPD.shape[2]).to(tokens_BPD)
        latents_BLD = self.latents.expand(tokens_BPD.shape[0], -1, -1)
        for block in self.blocks:
            latents_BLD = block(latents_BLD, tokens_BPD, mask_BP)
        return latents_BLD


class ShapeGroupedLoRAGenerator(nn.Module):
    """Turns latents into the factors of every target layer."""

    def __init__(self, config: HyperNetworkConfig, layers: Sequence[LayerInfo]) -> None:
        super().__init__()
        width, self.rank = config.width, config.rank
        self.layers = tuple(layers)
        # Of unit size, so that the features of two layers or two ranks start out far apart: similar features would
        # make every rank's row of A and column of B the same, an adapter of rank 1 whatever R is.
        self.queries = nn.Parameter(torch.randn(len(layers), config.rank, width))
        self.blocks = nn.ModuleList(_GeneratorBlock(width, config.num_heads) for _ in range(config.generator_blocks))
        self.norm = nn.RMSNorm(width)
        shapes = sorted({(layer.in_features, layer.out_features) for layer in layers})
        self.a_heads = nn.ModuleDict({f"{i}x{o}": nn.Linear(width, i, bias=False) for i, o in shapes})
        self.b_heads = nn.ModuleDict({f"{i}x{o}": nn.Linear(width, o, bias=False) for i, o in shapes})
        for head in self.a_heads.values():
            nn.init.normal_(head.weight, std=1 / math.sqrt(3 * head.out_features))  # type: ignore[arg-type, operator]
        for head in self.b_heads.values():
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]

    def forward(self, latents_BLD: Tensor) -> AdapterWeights:
        """Factors a [B, R, I] and b [B, O, R] of every target layer."""
        x_BQD = self.queries.flatten(0, 1).expand(latents_BLD.shape[0], -1, -1)
        for block in self.blocks:
            x_BQD = block(x_BQD, latents_BLD)
        features_BMRD = F.normalize(self.norm(x_BQD), dim=-1).unflatten(1, (len(self.layers), self.rank))
        weights: AdapterWeights = {}
        for shape in self.a_heads:
            members = [m for m, layer in enumerate(self.layers) if f"{layer.in_features}x{layer.out_features}" == shape]
            a_BMRI = self.a_heads[shape](features_BMRD[:, members])
            b_BMRO = self.b_heads[shape](features_BMRD[:, members])
            for place, m in enumerate(members):
                weights[self.layers[m].name] = LoRAPair(a_BMRI[:, place], b_BMRO[:, place].transpose(1, 2))
        return {layer.name: weights[layer.name] for layer in self.layers}


class AgenticHyperNetwork(nn.Module):
    """Prompt embeddings in, LoRA factors out."""

    def __init__(self, config: HyperNetworkConfig, layers: Sequence[LayerInfo], embedding_size: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = PromptEncoder(config, embedding_size)
        self.generator = ShapeGroupedLoRAGenerator(config, layers)

    def forward(self, embeddings_BPE: Tensor, mask_BP: Tensor) -> AdapterWeights:
        """Factors a [B, R, I] and b [B, O, R] of every target layer for B prompts.

        Args:
            embeddings_BPE: rows of the student's frozen embedding table.
            mask_BP: bool, True at real tokens.
        """
        return self.generator(self.encoder(embeddings_BPE, mask_BP))


def _sinusoids(length: int, width: int) -> Tensor:
    """[length, width] position features (Attention Is All You Need, arXiv:1706.03762, section 3.5)."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
