"""What a run computes, in operations of matrix products, by what computes them.

The student's are counted by `hyperagent.flops`; its adapters and the hypernetwork come on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from hyperagent.flops import ModelShape
from hyperagent.model.config import EMBEDDINGS
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.planning.network_cost import NetworkCost

HYPERNETWORK = "hypernetwork"


@dataclass(frozen=True)
class Trajectories:
    """Lengths of a training split, [n] each."""

    tokens: Sequence[int]
    """In the student's view."""
    supervised: Sequence[int]
    prompts: Sequence[int]


@dataclass(frozen=True)
class Trained:
    """What is trained in front of the student."""

    adapter_parameters: int
    """Numbers in one adapter."""
    num_parameters: int
    network: NetworkCost | None
    """None for a static adapter."""


def epoch_operations(
    recipe: TrainRecipe,
    model: PreTrainedModel,
    trained: Trained,
    trajectories: Trajectories,
    passes: Mapping[str, float],
) -> dict[str, float]:
    """Of one epoch, forward and backward.

    Args:
        model: the student on the meta device.
        passes: of the student, `hyperagent.flops.FROZEN` or `EXECUTED`.
    """
    shape = ModelShape.of(model.get_decoder(), model.config.get_text_config())
    tokens = np.array(trajectories.tokens, dtype=np.int64)
    student = shape.training_flops(tokens, np.array(trajectories.supervised, dtype=np.int64), passes)
    # Both operands of an adapter's product have gradients: one pass more than a frozen one.
    adapters = 2 * trained.adapter_parameters * tokens.sum() * (passes["linear"] + 1)
    network = 0.0 if trained.network is None else sum(map(trained.network.training_flops, trajectories.prompts))
    return {
        "student's linear layers": float(student["linear"].sum()),
        "student's attention": float(student["attention"].sum()),
        "student's recurrence": float(student["recurrent"].sum()),
        "output head and loss": float(student["head"].sum()),
        "adapters in the student": float(adapters),
        "prompt's features": _feature_flops(recipe, shape, model, trajectories.prompts) if trained.network else 0.0,
        HYPERNETWORK: network,
    }


def _feature_flops(recipe: TrainRecipe, shape: ModelShape, model: PreTrainedModel, prompts: Sequence[int]) -> float:
    """Of the student's first layers, forward alone, where the featurizer runs them; all layers are taken to cost the same."""
    if recipe.hypernetwork.featurizer == EMBEDDINGS:
        return 0.0
    num_layers = int(recipe.hypernetwork.featurizer.removeprefix("hidden@"))
    forward = shape.forward_flops(np.array(prompts, dtype=np.int64), np.zeros(len(prompts), dtype=np.int64))
    share = num_layers / model.config.get_text_config().num_hidden_layers
    return share * sum(float(flops.sum()) for flops in forward.values())
