"""The hypernetwork: one prompt in, one LoRA adapter for every target layer out, in one forward pass.

    prompt features [B, P, E] ──> PromptEncoder ──> latents [B, L, D] ──> ShapeGroupedLoRAGenerator ──> A, B per layer

Legend of shape suffixes: B samples, P prompt tokens, E hidden size of the student, L latents, D width,
M target layers, S slots per layer, R rank, I and O a layer's input and output size.

The encoder pools by cross-attention from a fixed set of latents (Perceiver IO, arXiv:2107.14795), so its cost is
linear in P. The generator asks one query per layer and slot, a slot being one rank, and turns each answer into one
row of A and one column of B; layers of a group share a head, so parameters grow with the number of groups, not of
layers. Start and scale, and what of them was measured: docs/hypernetwork.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperagent.errors import InvalidRequest
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.blocks import Attention, FeedForward, linear, sinusoids
from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.static_lora import StaticLoRA

_MAX_L1 = 32.0
"""Largest L1 norm of a feature that a head reads, and so the most, times the learning rate, that one step of Adam
moves an entry of B, whatever the width: |step| <= lr * sum |f| <= lr * sqrt(D) * |f|_2."""


class _EncoderBlock(nn.Module):
    """Latents read the prompt, mix among themselves, and think."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.read = Attention(width, num_heads)
        self.mix = Attention(width, num_heads)
        self.think = FeedForward(width)

    def forward(self, latents_BLD: Tensor, tokens_BPD: Tensor, mask_BP: Tensor, places_PD: Tensor) -> Tensor:
        latents_BLD = self.read(latents_BLD, tokens_BPD, mask_BP, places_PD)
        thought: Tensor = self.think(self.mix(latents_BLD, latents_BLD))
        return thought


class PromptEncoder(nn.Module):
    """Pools a prompt of any length into L latents."""

    def __init__(self, config: HyperNetworkConfig, embedding_size: int) -> None:
        super().__init__()
        width = config.width
        self.norm_input = nn.RMSNorm(embedding_size)
        self.input = linear(embedding_size, width)
        self.latents = nn.Parameter(torch.randn(config.num_latents, width) / math.sqrt(width))
        self.blocks = nn.ModuleList(_EncoderBlock(width, config.num_heads) for _ in range(config.encoder_blocks))

    def forward(self, embeddings_BPE: Tensor, mask_BP: Tensor) -> Tensor:
        """Latents [B, L, D] of prompt features; `mask_BP` is True at real tokens.

        Raises:
            InvalidRequest: the mask is of another shape, or a prompt has no real token.
        """
        if mask_BP.shape != embeddings_BPE.shape[:2]:
            raise InvalidRequest(
                f"a prompt mask of shape {list(mask_BP.shape)} does not belong to features of shape {list(embeddings_BPE.shape)}"
            )
        if not mask_BP.any(1).all():
            raise InvalidRequest("a prompt has no real token: its mask is False throughout; give it one at least")
        tokens_BPD = self.input(self.norm_input(embeddings_BPE))
        # The table's rows carry no order (sinusoidal: defined for every length).
        places_PD = sinusoids(tokens_BPD.shape[1], tokens_BPD.shape[2], tokens_BPD.device)
        latents_BLD = self.latents.expand(tokens_BPD.shape[0], -1, -1)
        for block in self.blocks:
            latents_BLD = block(latents_BLD, tokens_BPD, mask_BP, places_PD)
        return latents_BLD


class _GeneratorBlock(nn.Module):
    """Queries read the latents, mix across layers and, where there is more than one, slots, and think.

    The two mixing attentions are factorized, over M vectors and over S, as one over all M S would be quadratic in them.
    """

    def __init__(self, width: int, num_heads: int, *, num_slots: int) -> None:
        super().__init__()
        self.read = Attention(width, num_heads)
        self.mix_layers = Attention(width, num_heads)
        self.mix_slots = Attention(width, num_heads) if num_slots > 1 else None
        self.think = FeedForward(width)

    def forward(self, x_BMSD: Tensor, latents_BLD: Tensor) -> Tensor:
        num, layers, slots, _ = x_BMSD.shape
        x_BMSD = self.read(x_BMSD.flatten(1, 2), latents_BLD).unflatten(1, (layers, slots))
        across_layers = x_BMSD.transpose(1, 2).flatten(0, 1)
        x_BMSD = self.mix_layers(across_layers, across_layers).unflatten(0, (num, slots)).transpose(1, 2)
        if self.mix_slots is not None:
            across_slots = x_BMSD.flatten(0, 1)
            x_BMSD = self.mix_slots(across_slots, across_slots).unflatten(0, (num, layers))
        thought: Tensor = self.think(x_BMSD)
        return thought


class ShapeGroupedLoRAGenerator(nn.Module):
    """Turns latents into the factors of every target layer."""

    def __init__(self, config: HyperNetworkConfig, layers: Sequence[LayerInfo], *, zero_a: bool) -> None:
        """`zero_a` starts A's heads at zero as well, for what is added to a static adapter."""
        super().__init__()
        width, self.rank = config.width, config.rank
        num_slots = config.rank if config.head == "per_rank" else 1
        self.layers = tuple(layers)
        # Of unit size, so that the features of two layers or two ranks start out far apart: similar features would
        # make every rank's row of A and column of B the same, an adapter of rank 1 whatever R is.
        self.queries = nn.Parameter(torch.randn(len(layers), num_slots, width))
        self.blocks = nn.ModuleList(
            _GeneratorBlock(width, config.num_heads, num_slots=num_slots) for _ in range(config.generator_blocks)
        )
        self.norm = nn.RMSNorm(width)
        self.feature_norm = _MAX_L1 / math.sqrt(width)
        """L2 norm of the features that the heads read."""
        self._members: dict[str, list[int]] = {}
        for index, layer in enumerate(layers):
            self._members.setdefault(_group(layer, config), []).append(index)
        self.a_heads = nn.ModuleDict()
        self.b_heads = nn.ModuleDict()
        for group, (first, *_) in self._members.items():
            layer, repeat = layers[first], config.rank // num_slots
            self.a_heads[group] = nn.Linear(width, repeat * layer.in_features, bias=False)
            self.b_heads[group] = nn.Linear(width, repeat * layer.out_features, bias=False)
            std = 0.0 if zero_a else 1 / (self.feature_norm * math.sqrt(3 * layer.in_features))
            nn.init.normal_(self.a_heads[group].weight, std=std)  # type: ignore[arg-type]
            nn.init.zeros_(self.b_heads[group].weight)  # type: ignore[arg-type]

    def forward(self, latents_BLD: Tensor) -> AdapterWeights:
        """Factors a [B, R, I] and b [B, O, R] of every target layer."""
        return self.factors(self.features(latents_BLD))

    def features(self, latents_BLD: Tensor) -> Tensor:
        """[B, M, S, D]: what the heads read, each of L2 norm `feature_norm`, so that no prompt makes a large adapter."""
        x_BMSD = self.queries.expand(len(latents_BLD), -1, -1, -1)
        for block in self.blocks:
            x_BMSD = block(x_BMSD, latents_BLD)
        return F.normalize(self.norm(x_BMSD), dim=-1) * self.feature_norm

    def factors(self, features_BMSD: Tensor) -> AdapterWeights:
        """What the heads make of `features`: a [B, R, I] and b [B, O, R] of every target layer."""
        num = len(features_BMSD)
        weights: AdapterWeights = {}
        for group, members in self._members.items():
            read_BMSD = features_BMSD[:, members]
            a_BMRI = self.a_heads[group](read_BMSD).reshape(num, len(members), self.rank, -1)
            b_BMRO = self.b_heads[group](read_BMSD).reshape(num, len(members), self.rank, -1)
            for place, m in enumerate(members):
                weights[self.layers[m].name] = LoRAPair(a_BMRI[:, place], b_BMRO[:, place].transpose(1, 2))
        return {layer.name: weights[layer.name] for layer in self.layers}


class AgenticHyperNetwork(nn.Module):
    """Prompt features in, LoRA factors out; from zero, or on top of a static adapter."""

    def __init__(
        self,
        config: HyperNetworkConfig,
        layers: Sequence[LayerInfo],
        embedding_size: int,
        *,
        warm_start: AdapterWeights | None = None,
    ) -> None:
        """A hypernetwork at its start.

        Args:
            embedding_size: E.
            warm_start: a static adapter A0 [R, I], B0 [O, R] of every layer, to which the generated factors are
                added: A = A0 + dA(prompt), B = B0 + dB(prompt), of the same rank, with dA = dB = 0 at the start.
                It stays as it is, so that whatever is gained is the prompt's doing.

        Raises:
            ConfigError: the static adapter is for other layers or of another rank.
        """
        super().__init__()
        self.config = config
        self.encoder = PromptEncoder(config, embedding_size)
        self.generator = ShapeGroupedLoRAGenerator(config, layers, zero_a=warm_start is not None)
        self.base: StaticLoRA | None = None
        if warm_start is not None:
            self.base = StaticLoRA.of(warm_start, layers, rank=config.rank, alpha=config.alpha).requires_grad_(False)

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        return self.generator.layers

    @property
    def scale(self) -> float:
        return self.config.scale

    def b_parameters(self) -> list[nn.Parameter]:
        """What makes B, which starts at zero."""
        return list(self.generator.b_heads.parameters())

    def forward(self, embeddings_BPE: Tensor, mask_BP: Tensor) -> AdapterWeights:
        """Factors a [B, R, I] and b [B, O, R] of every target layer for B prompts.

        Args:
            embeddings_BPE: what the config's featurizer makes of the prompts.
            mask_BP: bool, True at real tokens.

        Raises:
            InvalidRequest: the mask does not fit, or a prompt has no real token.
        """
        weights = self.generator(self.encoder(embeddings_BPE, mask_BP))
        if self.base is None:
            return weights
        base = self.base.adapter()
        return {name: LoRAPair(base[name].a + pair.a, base[name].b + pair.b) for name, pair in weights.items()}


def _group(layer: LayerInfo, config: HyperNetworkConfig) -> str:
    """Which heads a layer uses; a module's name, so without dots."""
    if config.head_grouping == "shape":
        return f"{layer.in_features}x{layer.out_features}"
    return layer.kind.replace(".", "-")
