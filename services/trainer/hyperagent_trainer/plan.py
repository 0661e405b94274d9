"""What a run will need of a machine: memory of each GPU item by item, operations, days; from the student's config alone.

Weights, gathered layers, kept inputs, picks, adapters and the network's state are arithmetic and exact. A layer's own peak, the
network's activations and the reserve are estimates, from the widths of what the layer computes. Times are operations
divided by an assumed share of the peak, the *frozen MFU*: twice the linear operations (forward, and the gradient of the
input) and three times those of attention. Recomputation, the head, Gated DeltaNet's recurrence and the hypernetwork are not
among them, and neither is the sum of the network's gradients between nodes in the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hyperagent.errors import ConfigError
from hyperagent.model.targets import LayerInfo, num_adapter_parameters
from hyperagent_trainer.batches import batch_order
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.plan_machines import Machine
from hyperagent_trainer.step_cost import StepCost
from hyperagent_trainer.steps import plan_step

_LOSS_WORKSPACE = 600 * 2**20
_RESERVE = 6 * 10**9
"""Of the driver, NCCL and fragmentation; an assumption."""
# Weight, gradient and AdamW's two moments, float32.
_TRAINED_BYTES = 16


@dataclass(frozen=True)
class MemoryItem:
    """One part of a GPU's memory."""

    name: str
    bytes: int
    is_exact: bool


@dataclass(frozen=True)
class Plan:
    """A run on a machine."""

    memory: tuple[MemoryItem, ...]
    memory_available: int
    num_steps: int
    tokens_per_step: float
    flops_per_step: float
    """With recomputation, over all GPUs."""
    step_efficiency: float
    """Mean over maximum of the GPUs' work."""
    step_s: float
    """The longer of computing and gathering, which overlap."""
    gather_s: float
    """Of a step: every layer is gathered twice for each micro-batch."""

    @property
    def memory_total(self) -> int:
        return sum(item.bytes for item in self.memory)

    @property
    def fits(self) -> bool:
        return self.memory_total <= self.memory_available

    @property
    def days(self) -> float:
        return self.num_steps * self.step_s / 86_400


def make_plan(
    recipe: TrainRecipe,
    model: PreTrainedModel,
    layers: Sequence[LayerInfo],
    num_network_parameters: int,
    machine: Machine,
    lengths: Sequence[int],
    *,
    supervised_share: float,
    mfu: float,
) -> Plan:
    """The plan of a recipe whose training split has trajectories of these lengths.

    Args:
        model: the student on the meta device.
        layers: its targets.
        supervised_share: of the tokens.
        mfu: share of the peak that the frozen operations are assumed to reach.

    Raises:
        ConfigError: the recipe's number of processes is not that of a node's GPUs.
    """
    if recipe.processes not in (1, machine.gpus_per_node):
        raise ConfigError(
            f"the recipe starts {recipe.processes} processes, {machine.name} has {machine.gpus_per_node} GPUs in each node; "
            "make them equal"
        )
    if recipe.processes == 1:
        # One process trains on one GPU, whatever else there is.
        machine = replace(machine, gpus_per_node=1, nodes=1)
    recipe = recipe.in_steps(len(lengths))
    config = model.config.get_text_config()
    cost = StepCost.of(model.get_decoder(), config)
    costs = [cost(length) for length in lengths]
    steps = batch_order(lengths, batch_size=recipe.batch_size, seed=recipe.seed, epoch=0)
    plans = [plan_step(s, costs, rank=0, num_ranks=machine.gpus, size=recipe.micro_batch_size) for s in steps]
    work = sum(sum(costs[i] for i in step) for step in steps)
    slowest = sum(sum(costs[i] for i in step) / p.efficiency for step, p in zip(steps, plans, strict=True))
    efficiency = work / slowest
    frozen = sum(_frozen_flops(cost, n) for n in lengths) / len(steps)
    micro = float(np.mean([len(p.micro_batches) for p in plans]))
    gathered = sum(_bytes(layer, recipe) for layer in _layers_of(model))
    share = 1 - 1 / machine.gpus_per_node
    gather_s = 2 * micro * gathered * share / machine.link_bytes_per_s
    compute_s = frozen / (mfu * machine.flops * machine.gpus * efficiency)
    return Plan(
        memory=tuple(
            _memory(
                recipe, model, layers, num_network_parameters, machine, max(lengths), supervised_share=supervised_share
            )
        ),
        memory_available=machine.memory_bytes,
        num_steps=recipe.num_steps,
        tokens_per_step=sum(lengths) / len(steps),
        flops_per_step=work / len(steps),
        step_efficiency=efficiency,
        step_s=max(compute_s, gather_s),
        gather_s=gather_s,
    )


def _frozen_flops(cost: StepCost, num_tokens: int) -> float:
    """Linear operations twice, attention's three times: `StepCost` counts them three and four and a half times."""
    return cost.per_token * num_tokens * 2 / 3 + cost.per_token_squared * num_tokens**2 * 3 / 4.5


def _memory(
    recipe: TrainRecipe,
    model: PreTrainedModel,
    layers: Sequence[LayerInfo],
    num_network_parameters: int,
    machine: Machine,
    longest: int,
    *,
    supervised_share: float,
) -> list[MemoryItem]:
    decoder, config = model.get_decoder(), model.config.get_text_config()
    size, element = config.hidden_size, _element(recipe)
    tokens = longest * recipe.micro_batch_size
    tables: tuple[Tensor, ...] = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)  # type: ignore[assignment]
    whole = sum(table.numel() for table in tables)
    # A shard stays within a node, and a sharded network is gathered whole for its passes.
    network_shards = machine.gpus_per_node if recipe.shard_network else 1
    gathered_network = 0 if network_shards == 1 else 8 * num_network_parameters
    adapters = num_adapter_parameters(layers, recipe.hypernetwork.rank) * recipe.micro_batch_size
    routers = sum(1 for name, _ in decoder.named_modules() if name.endswith("mlp.experts"))
    picks = tokens * getattr(config, "num_experts_per_tok", 0) * routers
    kept = len(_layers_of(model)) * tokens * size * element
    inside = _activations(recipe, config, tokens, element)
    shards = machine.gpus_per_node
    largest = max(_bytes(layer, recipe) for layer in _layers_of(model))
    return [
        MemoryItem("student's layers, this GPU's shard", shard_bytes(decoder, shards, element), True),
        MemoryItem("embedding table and head, whole", whole * element, True),
        MemoryItem("layers gathered: one in use, one ahead", 0 if shards == 1 else 2 * largest, True),
        MemoryItem("inputs kept of all layers", kept if recipe.checkpoint_activations else 0, True),
        MemoryItem("one layer run again and backward" if recipe.checkpoint_activations else "activations", inside, False),
        MemoryItem("loss: workspace, hidden states, gradient", (recipe.loss_workspace_bytes or _LOSS_WORKSPACE) + round((1 + 2 * supervised_share) * tokens * size * element), True),
        MemoryItem("network, gradient and AdamW", math.ceil(num_network_parameters / network_shards) * _TRAINED_BYTES + gathered_network, True),
        MemoryItem("network's activations", 10 * recipe.max_prompt_tokens * recipe.hypernetwork.width * 4 * recipe.micro_batch_size, False),
        MemoryItem("adapters and their gradients", 3 * 4 * adapters, True),
        MemoryItem("router picks", 2 * picks if recipe.checkpoint_activations else 0, True),
        MemoryItem("driver, NCCL, fragmentation", _RESERVE, False),
    ]  # fmt: skip


def shard_bytes(decoder: nn.Module, shards: int, element: int) -> int:
    """Of the decoder's parameters without the embedding table, cut along their first dimension as FSDP2 cuts them; the largest shard."""
    rows = (
        (math.ceil(p.shape[0] / shards), p.shape[1:])
        for n, p in decoder.named_parameters()
        if not n.startswith("embed_tokens.")
    )
    return element * sum(first * math.prod(rest) for first, rest in rows)


def _activations(recipe: TrainRecipe, config: PreTrainedConfig, tokens: int, element: int) -> int:
    """Bytes that are kept inside decoder layers: of one at a time where they are run again, or else of all."""
    mixers = _mixer_bytes(config, tokens, element)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if recipe.checkpoint_activations:
        return max(mixers.values()) + _expert_bytes(config, min(tokens, recipe.moe_tile_tokens or tokens), element)
    return sum(mixers[kind] for kind in kinds) + len(kinds) * _expert_bytes(config, tokens, element)


def _mixer_bytes(config: PreTrainedConfig, tokens: int, element: int) -> dict[str, int]:
    """Of one layer's attention or Gated DeltaNet, by kind; an estimate.

    It keeps inputs and outputs of its products and of what stands between them, and its backward pass holds the
    gradients of the two widest of them beside.
    """
    size = config.hidden_size
    head_size = getattr(config, "head_dim", None) or size // config.num_attention_heads
    heads, keys = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    # x, projections, after norms and rotation, what attention makes, gated, o_proj's output.
    widths = {"full_attention": [size, 2 * heads + 2 * keys, heads + 2 * keys, heads, heads, heads, size]}
    if "linear_attention" in (getattr(config, "layer_types", None) or ()):
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        mixed = 2 * keys + values
        # x, in_proj_qkvz, before and after the convolution, q, k and v repeated, output and gated norm in float32, out_proj.
        widths["linear_attention"] = [size, mixed + values, mixed, mixed, 3 * values, 2 * values, 2 * values, size]
    return {kind: element * tokens * (sum(w) + sum(sorted(w)[-2:])) for kind, w in widths.items()}


def _expert_bytes(config: PreTrainedConfig, tokens: int, element: int) -> int:
    """Of routed experts: a copy of each token for each of its experts, before, within and after; and gradients. An estimate."""
    if not getattr(config, "num_experts", 0):
        return 0
    copies = tokens * config.num_experts_per_tok
    return 2 * element * copies * (2 * config.hidden_size + 3 * config.moe_intermediate_size)


def _layers_of(model: PreTrainedModel) -> nn.ModuleList:
    found: nn.ModuleList = model.get_decoder().layers
    return found


def _element(recipe: TrainRecipe) -> int:
    return 4 if recipe.student_dtype == "float32" else 2


def _bytes(module: nn.Module, recipe: TrainRecipe) -> int:
    return _element(recipe) * sum(p.numel() for p in module.parameters())
