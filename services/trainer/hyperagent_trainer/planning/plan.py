"""Predict a run's memory on each GPU, its operations and its days from configs and lengths.

Operations are those of matrix products. The student's are counted by `hyperagent.flops`, as `hyperagent data plan` counts
them for trajectories that are not tokenized yet; this module adds those of its adapters and the hypernetwork. Time is work
divided by an assumed share of the peak, the *frozen MFU*, where recomputation does not count as work. All assumptions are
listed in the plan (`Plan.assumptions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from hyperagent.errors import ConfigError
from hyperagent.flops import EXECUTED, FROZEN
from hyperagent.hardware import LINK_SHARE, Machine
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.data.cost import StepCost
from hyperagent_trainer.data.schedule import StepPlan, batch_order, plan_step
from hyperagent_trainer.planning.flops import HYPERNETWORK, Trained, Trajectories, epoch_operations
from hyperagent_trainer.planning.machines import CORE_FLOPS, is_cpu, num_cores
from hyperagent_trainer.planning.memory import (
    GPU_RESERVE,
    Load,
    MemoryItem,
    decoder_layers,
    element_bytes,
    memory_items,
    parameter_bytes,
)


@dataclass(frozen=True)
class Plan:
    """The predicted cost of a run on a machine."""

    memory: tuple[MemoryItem, ...]
    """Items of each GPU's memory."""
    memory_available: int
    """Bytes of each GPU's memory."""
    num_gpus: int
    """Number of the machine's GPUs."""
    num_steps: int
    tokens_per_step: float
    operations: Mapping[str, float]
    """Operations of a step over all GPUs, by the part that computes them, including recomputation."""
    step_efficiency: float
    """Mean over maximum of the GPUs' work."""
    step_s: float
    """Seconds of a step: the longer of computing and gathering, which overlap, plus the sum of gradients."""
    compute_s: float
    """Seconds per step of computing."""
    gather_s: float
    """Seconds per step of gathering: every layer is gathered twice for each micro-batch."""
    reduce_s: float
    """Seconds per step of summing the network's gradients within nodes and between them."""
    assumptions: tuple[str, ...]
    """Sentences that state what the plan assumes."""

    @property
    def memory_total(self) -> int:
        """Bytes that each GPU needs."""
        return sum(item.bytes for item in self.memory)

    @property
    def flops_per_step(self) -> float:
        """Operations of a step over all GPUs, including recomputation."""
        return sum(self.operations.values())

    @property
    def fits(self) -> bool:
        """Whether the run fits into each GPU's memory."""
        return self.memory_total <= self.memory_available

    @property
    def days(self) -> float:
        """Days that the steps take, without evaluations."""
        return self.num_steps * self.step_s / 86_400


def make_plan(
    recipe: TrainRecipe,
    model: PreTrainedModel,
    trained: Trained,
    machine: Machine,
    trajectories: Trajectories,
    *,
    mfu: float,
) -> Plan:
    """Make the plan of a recipe.

    Args:
        model: the student on the meta device.
        mfu: share of the peak that the work of the frozen student and the hypernetwork is assumed to reach.

    Raises:
        ConfigError: the recipe's number of processes is neither 1 nor the number of a node's GPUs.
    """
    num_gpus, machine = machine.gpus, _used(recipe, machine)
    lengths = trajectories.tokens
    recipe = recipe.in_steps(len(lengths))
    plans = _schedule(recipe, model, machine, lengths)
    efficiency = sum(work for work, _ in plans) / sum(work / plan.efficiency for work, plan in plans)
    micro = float(np.mean([len(plan.micro_batches) for _, plan in plans]))
    compute_s = _compute_s(recipe, epoch_operations(recipe, model, trained, trajectories, FROZEN), machine)
    compute_s /= mfu * machine.gpus * efficiency * len(plans)
    gather_s, reduce_s = _gather_s(recipe, model, machine, micro), _reduce_s(recipe, trained, machine, micro)
    passes = EXECUTED if recipe.checkpoint_activations else FROZEN
    executed = epoch_operations(recipe, model, trained, trajectories, passes)
    return Plan(
        memory=memory_items(
            recipe,
            model,
            machine,
            Load(max(lengths) * recipe.micro_batch_size, sum(trajectories.supervised) / sum(lengths)),
            network=trained.network,
            adapter_parameters=trained.adapter_parameters,
            trained_parameters=trained.num_parameters,
        ),
        memory_available=machine.memory_bytes,
        num_gpus=num_gpus,
        num_steps=recipe.num_steps,
        tokens_per_step=sum(lengths) / len(plans),
        operations={name: flops / len(plans) for name, flops in executed.items() if flops},
        step_efficiency=efficiency,
        step_s=max(compute_s, gather_s) + reduce_s,
        compute_s=compute_s,
        gather_s=gather_s,
        reduce_s=reduce_s,
        assumptions=_assumptions(machine, mfu),
    )


def _used(recipe: TrainRecipe, machine: Machine) -> Machine:
    """Return the part of the machine that the recipe's processes use."""
    if recipe.processes not in (1, machine.gpus_per_node):
        raise ConfigError(
            f"the recipe starts {recipe.processes} processes, {machine.name} has {machine.gpus_per_node} GPUs in each node; "
            "make the two numbers equal"
        )
    # A single process trains on one GPU, however many there are.
    return replace(machine, gpus_per_node=1, nodes=1) if recipe.processes == 1 else machine


def _schedule(
    recipe: TrainRecipe, model: PreTrainedModel, machine: Machine, lengths: Sequence[int]
) -> list[tuple[float, StepPlan]]:
    """Return the operations and the plan of each step of an epoch."""
    cost = StepCost.of(model.get_decoder(), model.config.get_text_config())
    costs = [cost(length) for length in lengths]
    steps = batch_order(lengths, batch_size=recipe.batch_size, seed=recipe.seed, epoch=0)
    plans = [plan_step(s, costs, rank=0, num_ranks=machine.gpus, size=recipe.micro_batch_size) for s in steps]
    return [(sum(costs[i] for i in step), plan) for step, plan in zip(steps, plans, strict=True)]


def _compute_s(recipe: TrainRecipe, operations: Mapping[str, float], machine: Machine) -> float:
    """Return the seconds of one GPU at its peak; the hypernetwork computes in float32, whatever the student's dtype."""
    rate = machine.float32_flops if recipe.student_dtype == "float32" else machine.flops
    network = operations[HYPERNETWORK]
    return (sum(operations.values()) - network) / rate + network / machine.float32_flops


def _gather_s(recipe: TrainRecipe, model: PreTrainedModel, machine: Machine, micro_batches: float) -> float:
    """Return the seconds to gather the layers' weights from a node's other GPUs, for the forward and the backward pass."""
    gathered = sum(parameter_bytes(layer, element_bytes(recipe)) for layer in decoder_layers(model))
    return 2 * micro_batches * gathered * (1 - 1 / machine.gpus_per_node) / machine.link_bytes_per_s


def _reduce_s(recipe: TrainRecipe, trained: Trained, machine: Machine, micro_batches: float) -> float:
    """Return the seconds to sum the network's float32 gradients within every node and then over all nodes.

    The frozen student has no gradients. Those of a sharded network are summed after each backward pass, others once a step.
    """
    gradients = 4 * trained.num_parameters * (micro_batches if recipe.shard_network else 1)
    within = 2 * gradients * (1 - 1 / machine.gpus_per_node) / machine.link_bytes_per_s
    between = 2 * gradients * (1 - 1 / machine.nodes) / machine.node_link_bytes_per_s
    return within + between


def _assumptions(machine: Machine, mfu: float) -> tuple[str, ...]:
    if is_cpu(machine):
        return (
            f"{num_cores()} cores of {CORE_FLOPS / 1e9:.0f} GFLOP/s in float32, of which {mfu:.0%} are reached; a student too "
            "small to fill its matrix products reaches less",
            "the Gated DeltaNet's reference implementation, which transformers has for a CPU",
        )
    rates = f"{machine.flops / 1e12:.0f} TFLOP/s in bfloat16, {machine.float32_flops / 1e12:.1f} in float32"
    link, between = machine.link_bytes_per_s / 1e9, machine.node_link_bytes_per_s / 1e9
    found = [
        f"{mfu:.0%} of the peak is reached by work that is not recomputation: {rates}, in which the hypernetwork computes",
        "kernels for attention, Gated DeltaNet and its convolution; computing waits for no data and no evaluation",
        f"{GPU_RESERVE / 1e9:.0f} GB for driver, NCCL and fragmentation",
    ]
    if machine.gpus_per_node > 1:
        found.append(
            f"a GPU receives {link:.0f} GB/s from its node, {LINK_SHARE:.0%} of the nominal rate, while it computes; "
            "gradients are summed after that"
        )
    if machine.nodes > 1:
        found.append(
            f"a node receives {between:.0f} GB/s from the others, {LINK_SHARE:.0%} of one network adapter for each GPU; the "
            "student is sharded within nodes, so nothing but the network's gradients passes between them"
        )
    return tuple(found)
