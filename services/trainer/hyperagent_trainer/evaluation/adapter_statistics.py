"""Measure how large generated adapters are relative to the weights they change, and how they differ between prompts.

Legend of shape suffixes: P prompts, R rank, I and O input and output features.

Deltas are never computed: with G = B'B and H = A A', both [R, R], the inner product of two deltas is the sum of G * H.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.config import LayerInfo
from hyperagent_trainer.distributed import full_tensor


@dataclass(frozen=True)
class AdapterStatistics:
    """Statistics of the adapters of several prompts."""

    relative_norm: dict[str, float]
    """Frobenius norm of scale * B A over that of W, root mean square over prompts and layers, by kind of layer."""
    cosine: float | None
    """Cosine between the deltas of two prompts over all layers, mean over all pairs of prompts; None for one prompt or zero
    deltas. 1 means that the network ignores the prompt."""


@torch.no_grad()
def adapter_statistics(
    adapters: AdapterWeights, layers: Sequence[LayerInfo], weight_norms: Mapping[str, float], *, scale: float
) -> AdapterStatistics:
    """Compute the statistics of adapters a [P, R, I] and b [P, O, R] by layer.

    Args:
        weight_norms: Frobenius norm of each target layer's weight, by layer name.
        scale: alpha / rank.
    """
    shares: dict[str, list[float]] = defaultdict(list)
    products_PP = torch.zeros(())
    for layer in layers:
        layer_PP = scale**2 * _inner_products(adapters[layer.name])
        shares[layer.kind].append(float(layer_PP.diagonal().mean()) / weight_norms[layer.name] ** 2)
        products_PP = products_PP + layer_PP
    cosines_PP, num = _normalized(products_PP), len(products_PP)
    cosine = None
    if num > 1 and cosines_PP is not None:
        cosine = float((cosines_PP.sum() - num) / (num * (num - 1)))
    return AdapterStatistics({kind: (sum(s) / len(s)) ** 0.5 for kind, s in shares.items()}, cosine)


@torch.no_grad()
def cosines(adapters: AdapterWeights) -> Tensor | None:
    """Return the cosines between the deltas of all pairs of prompts over all layers, float64, shape [P, P].

    Returns:
        None if a delta is zero.
    """
    return _normalized(torch.stack([_inner_products(pair) for pair in adapters.values()]).sum(0))


def _normalized(products_PP: Tensor) -> Tensor | None:
    norms_P = products_PP.diagonal().sqrt()
    return products_PP / norms_P[:, None] / norms_P if norms_P.all() else None


def _inner_products(pair: LoRAPair) -> Tensor:
    """Return the inner products of the deltas B A of all pairs of prompts, float64, shape [P, P]."""
    a_PRI, b_POR = pair.a.double(), pair.b.double()
    g_PPRR = torch.einsum("por,qos->pqrs", b_POR, b_POR)
    h_PPRR = torch.einsum("pri,qsi->pqrs", a_PRI, a_PRI)
    return (g_PPRR * h_PPRR).sum((2, 3))


@torch.no_grad()
def weight_norms(model: nn.Module, layers: Sequence[LayerInfo]) -> dict[str, float]:
    """Return the Frobenius norm of each target layer's weight; with a sharded model, every rank must call this."""
    weights = [model.get_submodule(layer.name).weight for layer in layers]
    return {layer.name: float(full_tensor(weight.norm())) for layer, weight in zip(layers, weights, strict=True)}  # type: ignore[operator]


def gradient_norms(network: nn.Module) -> dict[str, float]:
    """Return the gradient's L2 norm by part of the network: each group of heads, and the rest by top-level module."""
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    # One transfer from the device for all norms.
    norms = torch.stack([full_tensor(gradient.norm()) for gradient in gradients.values()]).tolist()
    squares: dict[str, float] = defaultdict(float)
    for name, norm in zip(gradients, norms, strict=True):
        squares[_part(name)] += norm**2
    return {part: square**0.5 for part, square in squares.items()}


def _part(name: str) -> str:
    """Return a parameter's part: `b_heads.2048x512` for `generator.b_heads.2048x512.weight`, else the first name."""
    parts = name.split(".")
    heads = [i for i, part in enumerate(parts) if part in ("a_heads", "b_heads")]
    return ".".join(parts[heads[0] : heads[0] + 2]) if heads else parts[0]
