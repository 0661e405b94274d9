"""Build, shard, restore and describe the network of a recipe."""

from __future__ import annotations

import structlog
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from hyperagent.errors import ConfigError, CorruptRecord, InvalidRequest
from hyperagent.identity import DataIdentity
from hyperagent.model.adapter import LoRAPair
from hyperagent.model.bundle import hypernetwork_of
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.manifest import Mode, NetworkManifest
from hyperagent.model.peft_io import ImportedAdapter, read_adapter
from hyperagent.model.static_lora import StaticLoRA
from hyperagent.model.targets import discover_target_layers, num_adapter_parameters
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.distributed import Ranks, full_tensor
from hyperagent_trainer.network.adapted_student import AdaptedStudent, AdapterNetwork
from hyperagent_trainer.student.student import Student

log = structlog.get_logger()

# FSDP2 searches a module's outputs for tensors, to know when its backward pass begins, and needs this to look into pairs.
pytree.register_dataclass(LoRAPair)


def read_warm_start(recipe: TrainRecipe) -> ImportedAdapter | None:
    """Read the static adapter that the recipe's hypernetwork starts from; None if the recipe names none.

    Raises:
        ConfigError: the adapter is not a plain LoRA, or its rank or alpha is not the hypernetwork's.
        CorruptRecord: its files are damaged.
    """
    if recipe.warm_start is None:
        return None
    read, config = read_adapter(recipe.warm_start), recipe.hypernetwork
    if (read.rank, read.alpha) != (config.rank, config.alpha):
        raise ConfigError(
            f"the adapter in {recipe.warm_start} has rank {read.rank} and alpha {read.alpha:g}, the recipe's hypernetwork "
            f"{config.rank} and {config.alpha:g}; give the hypernetwork the adapter's rank and alpha"
        )
    return read


def assemble(
    recipe: TrainRecipe, student: Student, warm_start: ImportedAdapter | None, *, common_V: Tensor | None = None
) -> AdaptedStudent:
    """Make the recipe's initial network on the student's device, and put it in front of the student.

    Args:
        common_V: bool, True for the token ids that a hypernetwork does not read; None reads every id.

    Raises:
        ConfigError: the recipe's targets are not the student's, the static adapter is for other layers, or the recipe's
            loss_backend cannot run on the student's device.
    """
    network = make_network(recipe, student, warm_start, common_V=common_V)
    log.info(
        "network made",
        arm=recipe.arm,
        warm_start=None if warm_start is None else warm_start.fingerprint,
        layers=len(network.layers),
        adapter_parameters=num_adapter_parameters(network.layers, recipe.hypernetwork.rank),
        trained_parameters=_num_trained(network),
    )
    try:
        return AdaptedStudent(
            student, network, loss_workspace_bytes=recipe.loss_workspace_bytes, loss_backend=recipe.loss_backend
        )
    except InvalidRequest as error:
        raise ConfigError(f"the recipe's loss_backend cannot be used: {error}") from error


def make_network(
    recipe: TrainRecipe, student: Student, warm_start: ImportedAdapter | None, *, common_V: Tensor | None
) -> AdapterNetwork:
    """Make the recipe's initial network on the student's device; see `assemble`.

    Raises:
        ConfigError: the recipe's targets are not the student's, or the static adapter is for other layers.
    """
    config = recipe.hypernetwork
    layers = discover_target_layers(student.model, recipe.targets)
    network: AdapterNetwork
    if recipe.arm == "static":
        network = StaticLoRA(layers, rank=config.rank, alpha=config.alpha)
    else:
        base = None if warm_start is None else warm_start.weights
        size = student.embeddings.shape[1]
        network = AgenticHyperNetwork(config, layers, size, warm_start=base, common_V=common_V)
    return network.to(student.embeddings.device)


def shard_network(network: AdapterNetwork, ranks: Ranks) -> None:
    """Shard the network over the ranks; its backward pass then sums the gradients over them."""
    fully_shard(network, mesh=ranks.mesh)
    # The loss is already divided by the rows of all ranks, but by default FSDP2 averages the gradients.
    network.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    # Otherwise FSDP2 would use a scaled sum, which Gloo does not support.
    network.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]


def whole_network(
    network: AdapterNetwork, recipe: TrainRecipe, student: Student, warm_start: ImportedAdapter | None
) -> AdapterNetwork:
    """Return the unsharded network (a copy if it is sharded); a collective call that every rank must make."""
    state = {name: full_tensor(tensor) for name, tensor in network.state_dict().items()}
    if not any(isinstance(p, DTensor) for p in network.parameters()):
        return network
    copy = make_network(recipe, student, warm_start, common_V=state.get("common_V"))
    copy.load_state_dict(state, strict=True)
    return copy


def restore_network(manifest: NetworkManifest, weights: dict[str, Tensor]) -> AdapterNetwork:
    """Restore the network of a checkpoint without its student.

    Raises:
        CorruptRecord: the weights do not fit the network that the manifest describes.
    """
    config = manifest.hypernetwork
    try:
        if manifest.mode != "static":
            return hypernetwork_of(manifest, weights)
        static = StaticLoRA(manifest.layers, rank=config.rank, alpha=config.alpha)
        static.load_state_dict(weights, strict=True)
    except (KeyError, RuntimeError) as error:
        raise CorruptRecord(
            f"the checkpoint's weights do not fit its manifest: {' '.join(str(error).split())}"
        ) from error
    return static


def describe(
    recipe: TrainRecipe, adapted: AdaptedStudent, warm_start: ImportedAdapter | None, *, data: DataIdentity
) -> NetworkManifest:
    """Return the manifest that ties the network's checkpoints and exports to the student and the data."""
    mode: Mode = "static" if recipe.arm == "static" else "from_zero" if warm_start is None else "warm_start"
    return NetworkManifest(
        student_weights=adapted.student.weights,
        data=data,
        mode=mode,
        warm_start=None if warm_start is None else warm_start.fingerprint,
        hypernetwork=recipe.hypernetwork,
        layers=adapted.network.layers,
    )


def _num_trained(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
