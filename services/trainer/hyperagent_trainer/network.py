"""The network that a recipe asks for, and what it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from torch import nn

from hyperagent.identity import DataIdentity
from hyperagent.model.adapter import AdapterWeights
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.manifest import Mode, NetworkManifest
from hyperagent.model.static_lora import StaticLoRA
from hyperagent.model.targets import LayerInfo, num_adapter_parameters
from hyperagent_trainer.adapted import AdapterNetwork
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.student import Student

log = structlog.get_logger()


@dataclass(frozen=True)
class WarmStart:
    """The static adapter that a hypernetwork starts from."""

    weights: AdapterWeights
    """a [R, I] and b [O, R] by full module name."""
    fingerprint: str
    """BLAKE3 (hex) of the file they were read from."""


def make_network(
    recipe: TrainRecipe,
    student: Student,
    layers: Sequence[LayerInfo],
    *,
    data: DataIdentity,
    warm_start: WarmStart | None,
) -> tuple[AdapterNetwork, NetworkManifest]:
    """A network at its start, on the student's device, and what its checkpoints and its export carry.

    Raises:
        ConfigError: the static adapter is for other layers, of another rank or not finite.
    """
    config = recipe.hypernetwork
    network: AdapterNetwork
    mode: Mode
    if recipe.arm == "static":
        network, mode = StaticLoRA(layers, rank=config.rank, alpha=config.alpha), "static"
    else:
        weights, mode = (None, "from_zero") if warm_start is None else (warm_start.weights, "warm_start")
        network = AgenticHyperNetwork(config, layers, student.embeddings.shape[1], warm_start=weights)
    manifest = NetworkManifest(
        student_weights=student.weights,
        data=data,
        mode=mode,
        warm_start=None if warm_start is None else warm_start.fingerprint,
        hypernetwork=config,
        layers=tuple(layers),
    )
    log.info(
        "network made",
        mode=mode,
        layers=len(layers),
        adapter_parameters=num_adapter_parameters(layers, config.rank),
        trained_parameters=_num_trained(network),
    )
    return network.to(student.embeddings.device), manifest


def _num_trained(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
