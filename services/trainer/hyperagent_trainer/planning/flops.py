"""Count the operations of a run's matrix products, by the part that computes them.

The student's are counted by `hyperagent.flops`; this module adds those of its adapters and the hypernetwork.
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
    """Lengths of the trajectories of a training split."""

    tokens: Sequence[int]
    """Tokens of each trajectory in the student's view."""
    supervised: Sequence[int]
    """Supervised positions of each trajectory."""
    prompts: Sequence[int]
    """Prompt tokens of each trajectory."""


@dataclass(frozen=True)
class Trained:
    """Sizes of the network that is trained in front of the student."""

    adapter_parameters: int
    """Number of parameters in one adapter."""
    num_parameters: int
    """Number of trained parameters."""
    network: NetworkCost | None
    """Cost of the hypernetwork; None for a static adapter."""


def epoch_operations(
    recipe: TrainRecipe,
    model: PreTrainedModel,
    trained: Trained,
    trajectories: Trajectories,
    passes: Mapping[str, float],
) -> dict[str, float]:
    """Return the operations of one epoch, forward and backward, by the part that computes them.

    Args:
        model: the student on the meta device.
        passes: number of passes over the student, `hyperagent.flops.FROZEN` or `EXECUTED`.
    """
    shape = ModelShape.of(model.get_decoder(), model.config.get_text_config())
    tokens = np.array(trajectories.tokens, dtype=np.int64)
    student = shape.training_flops(tokens, np.array(trajectories.supervised, dtype=np.int64), passes)
    # Both operands of an adapter's product have gradients: one pass more than for a frozen weight.
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
    """Return the operations of the student's first layers, forward only, if the featurizer runs them.

    All layers are assumed to cost the same.
    """
    if recipe.hypernetwork.featurizer == EMBEDDINGS:
        return 0.0
    num_layers = int(recipe.hypernetwork.featurizer.removeprefix("hidden@"))
    forward = shape.forward_flops(np.array(prompts, dtype=np.int64), np.zeros(len(prompts), dtype=np.int64))
    share = num_layers / model.config.get_text_config().num_hidden_layers
    return share * sum(float(flops.sum()) for flops in forward.values())
