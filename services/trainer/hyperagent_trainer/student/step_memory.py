"""What the student keeps between its forward and backward pass, as a recipe says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.student.activation_checkpoint import RoutingWatch, recomputed_layers
from hyperagent_trainer.student.moe_tiles import tiled_experts


@contextmanager
def recomputation(model: PreTrainedModel, recipe: TrainRecipe) -> Iterator[RoutingWatch]:
    """Within the block, the student keeps for its backward pass what the recipe says."""
    if not recipe.checkpoint_activations:
        yield RoutingWatch()
        return
    with recomputed_layers(model) as watch:
        if recipe.moe_tile_tokens is None:
            yield watch
            return
        with tiled_experts(model, tile_tokens=recipe.moe_tile_tokens, watch=watch):
            yield watch
