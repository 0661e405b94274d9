"""Estimate the memory of a training step before the first one.

Weights, optimizer state, adapters and the loss's workspace are exact arithmetic. Activations are not: what autograd
keeps for the backward pass is counted on two short probes and extrapolated linearly to the step's tokens. That leaves
out the temporary memory of kernels, so the sum is a lower estimate.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hyperagent.architecture import LINEAR_ATTENTION_CHUNK
from hyperagent.model.adapter import LoRAPair
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.distributed import machine_bytes
from hyperagent_trainer.loss.distillation import default_workspace_bytes
from hyperagent_trainer.preflight.probe import Probe
from hyperagent_trainer.report import Check
from hyperagent_trainer.student.student import Student

# Multiples of the chunk to which the Gated DeltaNet's reference implementation pads.
_PROBE_TOKENS = (2 * LINEAR_ATTENTION_CHUNK, 4 * LINEAR_ATTENTION_CHUNK)


@dataclass(frozen=True)
class MemoryBudget:
    """The size of a step."""

    batch_size: int
    """Trajectories that are computed at once."""
    tokens_per_sample: int
    """Tokens of the longest trajectory in the student's view."""
    loss_workspace_bytes: int
    """Bytes of the loss's workspace."""
    recomputes: bool = False
    """Whether decoder layers keep only their inputs and are run again, one at a time, in the backward pass."""
    averages: bool = False
    """Whether an average of the trained weights is kept."""


def memory_budget(recipe: TrainRecipe, student: Student, *, tokens_per_sample: int) -> MemoryBudget:
    """Return the size of a step of this recipe, for a longest trajectory of `tokens_per_sample` tokens."""
    return MemoryBudget(
        min(recipe.micro_batch_size, recipe.batch_size),
        tokens_per_sample,
        loss_workspace_bytes=recipe.loss_workspace_bytes or default_workspace_bytes(student.head.device),
        recomputes=recipe.checkpoint_activations,
        averages=recipe.ema_decay is not None,
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part of a step's memory."""

    student: int
    """Weights of the student."""
    network: int
    """Weights and, for trained weights, gradients, AdamW's two moments, and the moving average if one is kept."""
    adapters: int
    """Factors of a batch's adapters and their gradients."""
    activations: int
    """Tensors that the student's forward pass keeps for its backward pass."""
    loss_workspace: int
    """Buffers of the loss."""

    @property
    def total(self) -> int:
        """Sum of all parts in bytes."""
        return sum(asdict(self).values())


def estimate_memory(probe: Probe, budget: MemoryBudget) -> MemoryEstimate:
    """Estimate the memory of one step on this student; runs two short forward passes."""
    parameters = list(probe.adapted.network.parameters())
    with torch.no_grad():
        pairs = [LoRAPair(pair.a[:1], pair.b[:1]) for pair in probe.generate().values()]
    of_sample = sum(side.numel() * side.element_size() for pair in pairs for side in (pair.a, pair.b))
    tokens = budget.batch_size * budget.tokens_per_sample
    copies = 5 if budget.averages else 4
    return MemoryEstimate(
        student=sum(bytes_by_dtype(probe.student.model).values()),
        network=sum((copies if p.requires_grad else 1) * p.numel() * p.element_size() for p in parameters),
        adapters=2 * budget.batch_size * of_sample,
        activations=round(_activation_bytes_per_token(probe, recomputes=budget.recomputes) * tokens),
        loss_workspace=budget.loss_workspace_bytes,
    )


def check_memory(probe: Probe, budget: MemoryBudget) -> Check:
    """Check that the estimate fits into the memory of the device."""
    estimate, available = estimate_memory(probe, budget), machine_bytes(probe.student.head.device)
    return _memory_check(
        {
            **{f"student in {name}": gib(size) for name, size in bytes_by_dtype(probe.student.model).items()},
            "network with AdamW and gradients": gib(estimate.network),
            "adapters": gib(estimate.adapters),
            "activations": gib(estimate.activations),
            "loss": gib(estimate.loss_workspace),
            "estimated sum": gib(estimate.total),
            "machine": gib(available),
        },
        estimate.total <= available,
    )


def check_weights_fit(skeleton: nn.Module, device: torch.device) -> Check:
    """Check that the weights of a model would fit into memory before they are read.

    Args:
        skeleton: the model on the meta device.
        device: the device that the weights would be loaded to.
    """
    sizes, available = bytes_by_dtype(skeleton), machine_bytes(device)
    return _memory_check(
        {**{f"student in {name}": gib(size) for name, size in sizes.items()}, "machine": gib(available)},
        sum(sizes.values()) <= available,
    )


def bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """Return the bytes of a model's parameters by dtype; sharded ones count with this rank's part, tied ones once."""
    sizes: Counter[str] = Counter()
    for p in model.parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        sizes[str(p.dtype).removeprefix("torch.")] += local.numel() * p.element_size()
    return dict(sizes)


def gib(size: int) -> str:
    """Format a number of bytes for people, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def saved_bytes(probe: Probe, num_tokens: int) -> int:
    """Return the bytes that autograd keeps for one forward pass of one sample, without the student's own weights."""
    # Sharded weights are gathered into new memory; they add the same bytes for any number of tokens.
    owned = {p.untyped_storage().data_ptr() for p in probe.student.model.parameters() if not isinstance(p, DTensor)}
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
            # The address of a freed storage could be reused, and two tensors would count as one.
            held.append(tensor)
        return tensor

    leaves = {name: LoRAPair(pair.a[:1], pair.b[:1]) for name, pair in probe.zero_leaves().items()}
    ids_1T = torch.arange(num_tokens, device=probe.student.head.device)[None] % probe.student.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), probe.adapted.injector.inject(leaves):
        hidden_1TD = probe.student.hidden_states(ids_1T)
    del hidden_1TD
    return sum(kept.values())


def _activation_bytes_per_token(probe: Probe, *, recomputes: bool) -> float:
    saved = _saved_bytes_per_token(probe)
    if not recomputes:
        return saved
    # Every layer's input, and everything that one layer keeps while it is run again.
    num_layers = len(probe.student.model.get_decoder().layers)
    return num_layers * probe.student.head.shape[1] * probe.student.head.element_size() + saved / num_layers


def _saved_bytes_per_token(probe: Probe) -> float:
    short, long = (saved_bytes(probe, n) for n in _PROBE_TOKENS)
    return (long - short) / (_PROBE_TOKENS[1] - _PROBE_TOKENS[0])


def _memory_check(measured: dict[str, str], fits: bool) -> Check:
    return Check(
        "memory",
        fits,
        measured,
        "an estimate no larger than the machine's memory",
        "the process would run out of memory; take a smaller batch, shorter trajectories or a larger machine",
    )
