"""Make AdamW and its learning-rate schedule from the recipe."""

from __future__ import annotations

import math

import torch

from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.network.adapted_student import AdapterNetwork

_BETAS = (0.9, 0.95)


def make_optimizer(network: AdapterNetwork, recipe: TrainRecipe) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, set for the first step; the heads of B have their own learning rate."""
    b_parameters = network.b_parameters()
    of_b = {id(p) for p in b_parameters}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in of_b]
    b_rate = recipe.learning_rate * recipe.b_head_learning_rate_factor
    first = learning_rate_factor(1, recipe)
    return torch.optim.AdamW(
        [
            {"params": parameters, "peak_lr": rate, "lr": rate * first}
            for parameters, rate in ((rest, recipe.learning_rate), (b_parameters, b_rate))
        ],
        betas=_BETAS,
        weight_decay=recipe.weight_decay,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, recipe: TrainRecipe) -> None:
    """Set every group's learning rate to the schedule's value at `step` (from 1)."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * learning_rate_factor(step, recipe)


def learning_rate_factor(step: int, recipe: TrainRecipe) -> float:
    """Return the share of the peak learning rate at `step` (from 1): linear warm-up, then a cosine to a tenth."""
    if step <= recipe.warmup_steps:
        return step / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
