"""Define the hypernetwork, which turns one prompt into a LoRA adapter for all target layers in one forward pass.

    prompt features [B, P, E] ──> PromptEncoder ──> latents [B, L, D] ──> ShapeGroupedLoRAGenerator ──> A, B per layer

Legend of shape suffixes: B samples, P prompt tokens, E hidden size of the student, L latents, D width,
M target layers, S slots per layer, R rank, I and O a layer's input and output size.

The encoder pools by cross-attention from a fixed set of latents (Perceiver IO, arXiv:2107.14795), so its cost is
linear in P. The generator has one query per layer and slot, where a slot is one rank, and turns each resulting feature
into one row of A and one column of B; the layers of a group share a head, so parameters grow with the number of groups,
not of layers. docs/hypernetwork.md explains initialization and scale, with measurements.
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
from hyperagent.model.common_tokens import readable
from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.static_lora import StaticLoRA

_MAX_L1 = 32.0
"""Largest L1 norm of a feature that a head reads. Times the learning rate, it bounds the change of an entry of B in one
step of Adam, regardless of the width: |step| <= lr * sum |f| <= lr * sqrt(D) * |f|_2."""


class _EncoderBlock(nn.Module):
    """Latents read the prompt, attend to each other and pass an MLP."""

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
        # A word must stay distinguishable from its neighbors: random signs turn the features of each distance into another
        # direction, as in holographic representations (Plate, 1995). All neighbors together start weaker than the word itself;
        # as strong as it, they cost a third of the gain on one of two seeds (docs/experiments.md). Training adapts them.
        self.bind_ND = nn.Parameter(
            (torch.randint(2, (config.neighbors, width)) * 2.0 - 1.0) / max(1, config.neighbors)
        )
        self.latents = nn.Parameter(torch.randn(config.num_latents, width) / math.sqrt(width))
        self.blocks = nn.ModuleList(_EncoderBlock(width, config.num_heads) for _ in range(config.encoder_blocks))

    def forward(self, embeddings_BPE: Tensor, mask_BP: Tensor) -> Tensor:
        """Return the latents [B, L, D] of prompt features; `mask_BP` is True at the tokens to read.

        Raises:
            InvalidRequest: the mask has another shape, or a prompt has no token to read.
        """
        if mask_BP.shape != embeddings_BPE.shape[:2]:
            raise InvalidRequest(
                f"a prompt mask of shape {list(mask_BP.shape)} does not match features of shape {list(embeddings_BPE.shape)}"
            )
        if not mask_BP.any(1).all():
            raise InvalidRequest("a prompt has no real token: its mask is False throughout; give it at least one")
        tokens_BPD = self._bound(self.input(self.norm_input(embeddings_BPE)))
        # Embedding rows carry no order; sinusoidal positions are defined for every length.
        places_PD = sinusoids(tokens_BPD.shape[1], tokens_BPD.shape[2], tokens_BPD.device)
        latents_BLD = self.latents.expand(tokens_BPD.shape[0], -1, -1)
        for block in self.blocks:
            latents_BLD = block(latents_BLD, tokens_BPD, mask_BP, places_PD)
        return latents_BLD

    def _bound(self, tokens_BPD: Tensor) -> Tensor:
        """Add the features of the preceding tokens to each token's: a depthwise causal convolution."""
        num_neighbors, num_tokens = len(self.bind_ND), tokens_BPD.shape[1]
        padded = F.pad(tokens_BPD, (0, 0, num_neighbors, 0))
        for distance, signs_D in enumerate(self.bind_ND, start=1):
            start = num_neighbors - distance
            tokens_BPD = tokens_BPD + signs_D * padded[:, start : start + num_tokens]
        return tokens_BPD


class _GeneratorBlock(nn.Module):
    """Queries read the latents, attend across layers and, if there are several, across slots, and pass an MLP.

    The attention is factorized into one over M layers and one over S slots, since one over all M S would be quadratic in M S.
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
    """Generates the factors of every target layer from the latents."""

    def __init__(self, config: HyperNetworkConfig, layers: Sequence[LayerInfo], *, zero_a: bool) -> None:
        """Create the generator; `zero_a` initializes A's heads to zero too, for factors added to a static adapter."""
        super().__init__()
        width, self.rank = config.width, config.rank
        num_slots = config.rank if config.head == "per_rank" else 1
        self.layers = tuple(layers)
        # Queries have unit scale, so that the features of two layers or two ranks start far apart: similar features would
        # give every rank the same row of A and column of B, an adapter of rank 1 regardless of R.
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
        """Return factors a [B, R, I] and b [B, O, R] of every target layer."""
        return self.factors(self.features(latents_BLD))

    def features(self, latents_BLD: Tensor) -> Tensor:
        """Return the heads' inputs [B, M, S, D], each with L2 norm `feature_norm`, so that no prompt gets a large adapter."""
        x_BMSD = self.queries.expand(len(latents_BLD), -1, -1, -1)
        for block in self.blocks:
            x_BMSD = block(x_BMSD, latents_BLD)
        return F.normalize(self.norm(x_BMSD), dim=-1) * self.feature_norm

    def factors(self, features_BMSD: Tensor) -> AdapterWeights:
        """Apply the heads to `features` and return a [B, R, I] and b [B, O, R] of every target layer."""
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
    """Maps prompt features to LoRA factors, starting from zero or on top of a static adapter."""

    def __init__(
        self,
        config: HyperNetworkConfig,
        layers: Sequence[LayerInfo],
        embedding_size: int,
        *,
        warm_start: AdapterWeights | None = None,
        common_V: Tensor | None = None,
    ) -> None:
        """Create an untrained hypernetwork.

        Args:
            config: shape of the hypernetwork.
            layers: target layers of the student.
            embedding_size: E, size of the prompt features.
            warm_start: a static adapter A0 [R, I], B0 [O, R] of every layer, to which the generated factors are
                added: A = A0 + dA(prompt), B = B0 + dB(prompt), of the same rank, with dA = dB = 0 at the start.
                It stays frozen, so that any improvement comes from the prompt.
            common_V: bool, True for token ids that are not read (`common_tokens.common_ids`); None reads every id.

        Raises:
            ConfigError: the static adapter is for other layers or has another rank.
        """
        super().__init__()
        self.config = config
        self.encoder = PromptEncoder(config, embedding_size)
        self.generator = ShapeGroupedLoRAGenerator(config, layers, zero_a=warm_start is not None)
        self.base: StaticLoRA | None = None
        if warm_start is not None:
            self.base = StaticLoRA.of(warm_start, layers, rank=config.rank, alpha=config.alpha).requires_grad_(False)
        self.common_V: Tensor
        """bool, True for token ids that are not read; of length 0 if every id is read."""
        self.register_buffer("common_V", torch.zeros(0, dtype=torch.bool) if common_V is None else common_V)

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        return self.generator.layers

    @property
    def scale(self) -> float:
        return self.config.scale

    def b_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that make B, which start at zero."""
        return list(self.generator.b_heads.parameters())

    def readable(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        """Return the mask [B, P] for `forward`, from the prompts' ids and their mask, True at real tokens."""
        return readable(ids_BP, mask_BP, self.common_V) if len(self.common_V) else mask_BP

    def forward(self, embeddings_BPE: Tensor, mask_BP: Tensor) -> AdapterWeights:
        """Return factors a [B, R, I] and b [B, O, R] of every target layer for B prompts.

        Args:
            embeddings_BPE: features of the prompts from the config's featurizer.
            mask_BP: bool, True at the tokens to read (see `readable`).

        Raises:
            InvalidRequest: the mask does not match the features, or a prompt has no real token.
        """
        weights = self.generator(self.encoder(embeddings_BPE, mask_BP))
        if self.base is None:
            return weights
        base = self.base.adapter()
        return {name: LoRAPair(base[name].a + pair.a, base[name].b + pair.b) for name, pair in weights.items()}


def _group(layer: LayerInfo, config: HyperNetworkConfig) -> str:
    """Return the name of a layer's group of heads, without dots since it is a module's name."""
    if config.head_grouping == "shape":
        return f"{layer.in_features}x{layer.out_features}"
    return layer.kind.replace(".", "-")
