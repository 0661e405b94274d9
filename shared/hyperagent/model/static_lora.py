"""Train one adapter for all prompts as plain parameters: a baseline and an optional start for hypernetworks.

Legend of shape suffixes: B samples, R rank, I and O a layer's input and output size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperagent.errors import ConfigError
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.config import LayerInfo


class StaticLoRA(nn.Module):
    """A trainable LoRA adapter with the interface of a hypernetwork, which ignores the prompt.

    It is initialized as in PEFT: A from kaiming_uniform_(a=sqrt(5)), which is uniform within 1/sqrt(I), and B zero.
    """

    def __init__(self, layers: Sequence[LayerInfo], *, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.layers = tuple(layers)
        # Lists in the order of the layers, because a parameter's name cannot contain the dots of a module's name.
        self.a = nn.ParameterList(torch.empty(rank, layer.in_features) for layer in layers)
        self.b = nn.ParameterList(torch.zeros(layer.out_features, rank) for layer in layers)
        for a_RI in self.a:
            nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))

    @classmethod
    def of(cls, weights: AdapterWeights, layers: Sequence[LayerInfo], *, rank: int, alpha: float) -> StaticLoRA:
        """Return a module with an adapter's factors, a [R, I] and b [O, R], copied as float32.

        Raises:
            ConfigError: the adapter is for other layers, has another rank or shape, or is not finite.
        """
        if surplus := sorted(set(weights) ^ {layer.name for layer in layers}):
            raise ConfigError(
                f"the static adapter and the targets differ in {len(surplus)} layers, such as {surplus[0]}; "
                "give the targets it was trained with"
            )
        made = cls(layers, rank=rank, alpha=alpha)
        with torch.no_grad():
            for layer, a_RI, b_OR in zip(layers, made.a, made.b, strict=True):
                pair = weights[layer.name]
                if pair.a.shape != a_RI.shape or pair.b.shape != b_OR.shape:
                    raise ConfigError(
                        f"the static adapter's factors at {layer.name} are {list(pair.a.shape)} and {list(pair.b.shape)}, "
                        f"not {list(a_RI.shape)} and {list(b_OR.shape)}; give one of rank {rank} for this student"
                    )
                if not (pair.a.isfinite().all() and pair.b.isfinite().all()):
                    raise ConfigError(f"the static adapter's factors at {layer.name} are not finite; train it again")
                a_RI.copy_(pair.a)
                b_OR.copy_(pair.b)
        return made

    def adapter(self) -> AdapterWeights:
        """Return the adapter: a [R, I] and b [O, R] of every layer."""
        return {layer.name: LoRAPair(a, b) for layer, a, b in zip(self.layers, self.a, self.b, strict=True)}

    def b_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that make B, which start at zero."""
        return list(self.b)

    def forward(self, embeddings_BPE: Tensor, mask_BP: Tensor) -> AdapterWeights:  # noqa: ARG002
        """Return factors a [B, R, I] and b [B, O, R] of every layer, the same for each of B prompts."""
        num = embeddings_BPE.shape[0]
        return {
            name: LoRAPair(pair.a.expand(num, -1, -1), pair.b.expand(num, -1, -1))
            for name, pair in self.adapter().items()
        }
