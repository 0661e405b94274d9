"""Mixture-of-experts blocks a few thousand tokens at a time, so that their memory does not grow with the sequence.

A block copies each token once for every expert it goes to, ten times in Qwen3-Next, and keeps several such copies for
the backward pass: at 131,072 tokens they alone would be 30 GB (arXiv:2506.13996 tiles dense blocks likewise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyperagent_trainer.student.activation_checkpoint import RoutingWatch, picks_kept


@contextmanager
def tiled_experts(model: nn.Module, *, tile_tokens: int, watch: RoutingWatch) -> Iterator[None]:
    """Within the block, every mixture-of-experts block runs tile by tile, and again tile by tile in the backward pass.

    Args:
        tile_tokens: of each sample; a sequence that is no longer runs as it does without tiles.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "experts") and hasattr(module, "gate"):
                module.forward = partial(_tiled, module.forward, tile_tokens, watch)
                stack.callback(delattr, module, "forward")
        yield


def _tiled(forward: Callable[[Tensor], Tensor], tile_tokens: int, watch: RoutingWatch, x_BTD: Tensor) -> Tensor:
    if x_BTD.shape[1] <= tile_tokens:
        return forward(x_BTD)
    tiles = [
        checkpoint(forward, x.contiguous(), use_reentrant=False, context_fn=picks_kept(watch))
        for x in x_BTD.split(tile_tokens, dim=1)
    ]
    return torch.cat(tiles, dim=1)
