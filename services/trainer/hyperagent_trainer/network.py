"""The network that a recipe asks for, and what it belongs to."""

from __future__ import annotations

import structlog
from torch import nn

from hyperagent.identity import DataIdentity
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.manifest import NetworkManifest
from hyperagent.model.static_lora import StaticLoRA
from hyperagent.model.targets import discover_target_layers, num_adapter_parameters
from hyperagent_trainer.adapted import AdaptedStudent, AdapterNetwork
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.student import Student

log = structlog.get_logger()


def assemble(recipe: TrainRecipe, student: Student) -> AdaptedStudent:
    """The recipe's network at its start, on the student's device and in front of it.

    Raises:
        ConfigError: the recipe's targets are not the student's, or its static adapter is for other layers, of another
            rank or not finite.
    """
    config = recipe.hypernetwork
    layers = discover_target_layers(student.model, recipe.targets)
    network: AdapterNetwork
    if recipe.arm == "static":
        network = StaticLoRA(layers, rank=config.rank, alpha=config.alpha)
    else:
        network = AgenticHyperNetwork(config, layers, student.embeddings.shape[1])
    log.info(
        "network made",
        arm=recipe.arm,
        layers=len(layers),
        adapter_parameters=num_adapter_parameters(layers, config.rank),
        trained_parameters=_num_trained(network),
    )
    network.to(student.embeddings.device)
    return AdaptedStudent(student, network, loss_workspace_bytes=recipe.loss_workspace_bytes)


def describe(recipe: TrainRecipe, adapted: AdaptedStudent, *, data: DataIdentity) -> NetworkManifest:
    """What the network's checkpoints and its export say that they belong to."""
    return NetworkManifest(
        student_weights=adapted.student.weights,
        data=data,
        mode="static" if recipe.arm == "static" else "from_zero",
        hypernetwork=recipe.hypernetwork,
        layers=adapted.network.layers,
    )


def _num_trained(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
