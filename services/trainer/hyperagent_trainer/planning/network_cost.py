"""Compute the hypernetwork's activation memory and operations from its config.

Legend of names: P prompt tokens, E hidden size of the student, L latents, D width, M target layers, S slots, Q queries and
C context vectors of an attention.

The table counts the float32 numbers that autograd keeps for one prompt. A norm without a fused kernel, as on a CPU, also keeps
its result before the weight: then n = 1, otherwise 0.

    attention   Q (4 + n) D      x, its norm, queries, and the attention's output; its scores are never kept
                C (3 + n) D      the norm of the context, keys, values; and C D where keys have their own positions
    MLP         Q (10 + n) D     x, its norm, and 4 D before and after the activation

A context is kept once, however many attentions read it; the learned latents and queries are parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from hyperagent.model.config import HyperNetworkConfig

_ELEMENT = 4


@dataclass(frozen=True)
class NetworkCost:
    """Memory and operations of one hypernetwork for one student."""

    config: HyperNetworkConfig
    num_targets: int
    """Number of target layers, M."""
    adapter_parameters: int
    """Number of parameters in one adapter."""
    embedding_size: int
    """Hidden size of the student, E."""

    def kept_bytes(self, prompt_tokens: int, *, fused_norms: bool) -> int:
        """Return the bytes kept for the backward pass of one prompt, without parameters and without the adapter itself."""
        config, n = self.config, 0 if fused_norms else 1
        width, latents, rows = config.width, config.num_latents, self._rows
        read, mix, mlp = 4 + n, 7 + 2 * n, 10 + n
        kept = prompt_tokens * 2 * self.embedding_size
        kept += width * prompt_tokens * (1 + config.encoder_blocks * (4 + n))
        if config.neighbors:
            kept += width * (prompt_tokens + config.neighbors)
        kept += width * latents * (config.encoder_blocks * (read + mix + mlp) - 1)
        kept += width * rows * (config.generator_blocks * (read + self._mixes * mix + mlp) - 1)
        # The latents as context; after the last block its output, the norm's output and the heads' input.
        kept += width * (latents * (1 + config.generator_blocks * (3 + n)) + rows * (3 + n))
        # A root mean square for each norm, a log-sum-exp for each attention and head, and the prompt's mask.
        kept += prompt_tokens * (2 + config.encoder_blocks)
        kept += rows * (config.generator_blocks * (1 + self._mixes) * config.num_heads)
        return _ELEMENT * kept

    def training_flops(self, prompt_tokens: int) -> float:
        """Return the operations of one prompt's matrix products, forward and backward.

        Every input of a product has a gradient, so each product is computed three times.
        """
        config = self.config
        width, latents, rows = config.width, config.num_latents, self._rows
        # Multiplications of a block: D^2 per row for each projection, 8 D^2 for an MLP, 2 D per pair for scores and values.
        encoder = (
            2 * prompt_tokens * width**2 + 14 * latents * width**2 + 2 * width * latents * (prompt_tokens + latents)
        )
        generator = 2 * latents * width**2 + (10 + 4 * self._mixes) * rows * width**2 + 2 * width * rows * latents
        generator += 2 * width * rows * self.num_targets
        if self._mixes > 1:
            generator += 2 * width * rows * (rows // self.num_targets)
        first = prompt_tokens * self.embedding_size * width
        heads = width * self.adapter_parameters
        return 3 * 2.0 * (first + config.encoder_blocks * encoder + config.generator_blocks * generator + heads)

    @property
    def _rows(self) -> int:
        """Number of the generator's queries, M S."""
        return self.num_targets * (self.config.rank if self.config.head == "per_rank" else 1)

    @property
    def _mixes(self) -> int:
        """Number of self-attentions in a generator block: over layers, and over slots if there are several."""
        return 2 if self._rows > self.num_targets else 1
