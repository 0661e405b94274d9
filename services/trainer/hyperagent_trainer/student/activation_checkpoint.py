"""Limit the student's activation memory: activation checkpointing and tiling of mixture-of-experts blocks.

Each decoder layer keeps only its input and is run again in the backward pass. Mixture-of-experts blocks run a few thousand
tokens at a time, so that their memory does not grow with the sequence: a block copies each token once for every expert it
goes to, ten times in Qwen3-Next, and keeps several such copies for the backward pass, 30 GB at 131,072 tokens
(arXiv:2506.13996 tiles dense blocks likewise).

The experts that a router picked are kept and not computed again. Kernels that sum in another order, or near ties, would
give a few tokens other experts the second time. With grouped products the saved shapes do not depend on the picks, so
nothing would raise, and the gradient would mix two different networks (pytorch/pytorch#171355,
huggingface/transformers#47467). Saving the result of `topk` itself would not work: the routers of transformers divide it
in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hyperagent.architecture import expert_blocks
from hyperagent.errors import DataError
from hyperagent_trainer.config import TrainRecipe

_TOPK = (torch.topk, torch.Tensor.topk)
_MAX_DISAGREEMENT = 0.02


class RoutingWatch:
    """Counts how often recomputation would have picked another expert than the forward pass did."""

    def __init__(self) -> None:
        self._changed: Tensor | None = None
        self._picks = 0

    def count(self, replayed: Tensor, recomputed: Tensor) -> None:
        """Compare one router's picks [tokens, k]: those of the forward pass and those that it would make now."""
        changed = (replayed.sort(-1).values != recomputed.sort(-1).values).sum()
        self._changed = changed if self._changed is None else self._changed + changed
        self._picks += replayed.numel()

    def take(self) -> float:
        """Return the share of changed picks since the last call; 0 without a router.

        Raises:
            DataError: the share is so large that the two passes cannot have had the same input and the same adapter.
        """
        share = 0.0 if self._changed is None else float(self._changed) / self._picks
        self._changed, self._picks = None, 0
        if share > _MAX_DISAGREEMENT:
            raise DataError(
                f"{share:.1%} of the experts picked in the forward pass would not be picked in its recomputation, so the "
                "gradient would be wrong: the two passes ran under different adapters, or a kernel is not deterministic"
            )
        return share


@contextmanager
def recomputation(model: PreTrainedModel, recipe: TrainRecipe) -> Iterator[RoutingWatch]:
    """Apply the recipe's activation checkpointing and expert tiling to the student within the block."""
    if not recipe.checkpoint_activations:
        yield RoutingWatch()
        return
    with recomputed_layers(model) as watch:
        if recipe.moe_tile_tokens is None:
            yield watch
            return
        with tiled_experts(model, tile_tokens=recipe.moe_tile_tokens, watch=watch):
            yield watch


@contextmanager
def recomputed_layers(model: PreTrainedModel) -> Iterator[RoutingWatch]:
    """Within the block, run decoder layers again in the backward pass instead of keeping their activations."""
    watch = RoutingWatch()

    with _renamed_methods():
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": picks_kept(watch)}
        )
    was_training = model.training
    # transformers checkpoints layers in training mode only; a frozen student without dropout computes the same in it.
    model.train()
    try:
        yield watch
    finally:
        model.train(was_training)
        with _renamed_methods():
            model.gradient_checkpointing_disable()
        # Enabling also hooks the embeddings so that inputs require gradients, and disabling does not remove that hook.
        model.disable_input_require_grads()


@contextmanager
def _renamed_methods() -> Iterator[None]:
    """Silence the warnings of transformers 5.2x, which renames two methods; both names work until version 6."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def tiled_experts(model: nn.Module, *, tile_tokens: int, watch: RoutingWatch) -> Iterator[None]:
    """Within the context, run every mixture-of-experts block tile by tile, also in the backward pass's recomputation.

    Args:
        tile_tokens: tokens of each sample in a tile; a sequence that is no longer runs as it does without tiles.
        watch: counts the picks that the recomputation would change.
    """
    with ExitStack() as stack:
        for block in expert_blocks(model).values():
            block.forward = partial(_tiled, block.forward, tile_tokens, watch)
            stack.callback(delattr, block, "forward")
        yield


def _tiled(forward: Callable[[Tensor], Tensor], tile_tokens: int, watch: RoutingWatch, x_BTD: Tensor) -> Tensor:
    if x_BTD.shape[1] <= tile_tokens:
        return forward(x_BTD)
    tiles = [
        checkpoint(forward, x.contiguous(), use_reentrant=False, context_fn=picks_kept(watch))
        for x in x_BTD.split(tile_tokens, dim=1)
    ]
    return torch.cat(tiles, dim=1)


def picks_kept(watch: RoutingWatch) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """Return a `context_fn` for `torch.utils.checkpoint` that makes `topk` repeat the forward pass's picks."""

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        picks: list[Tensor] = []
        return _Record(picks), _Replay(picks, watch)

    return contexts


class _Record(TorchFunctionMode):
    def __init__(self, picks: list[Tensor]) -> None:
        super().__init__()
        self._picks = picks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _TOPK:
            return func(*args, **(kwargs or {}))
        with torch.no_grad():
            indices = func(*args, **(kwargs or {})).indices
        # 16 bits hold every expert's index; 131,072 tokens with ten picks in 48 layers then take 126 MB.
        self._picks.append(indices.short())
        return _values_at(args[0], indices)


class _Replay(TorchFunctionMode):
    def __init__(self, picks: list[Tensor], watch: RoutingWatch) -> None:
        super().__init__()
        self._picks = iter(picks)
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _TOPK:
            return func(*args, **(kwargs or {}))
        indices = next(self._picks).long()
        with torch.no_grad():
            self._watch.count(indices, func(*args, **(kwargs or {})).indices)
        return _values_at(args[0], indices)


def _values_at(probabilities: Tensor, indices: Tensor) -> Any:
    """Return what `topk` would, with the same graph in both passes: torch compares the tensors that each pass saves."""
    return torch.return_types.topk((probabilities.gather(-1, indices), indices))
