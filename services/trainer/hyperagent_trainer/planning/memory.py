"""Compute what a run holds in each GPU's memory, item by item.

Weights, gathered layers, kept inputs, router picks, adapters and the network's state are exact arithmetic. What autograd keeps
is counted from layer widths, within 5 % of what it is measured to keep (`student_memory`, `network_cost`). The extra memory of
a backward pass and the reserve are estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperagent.architecture import expert_blocks, layer_types, num_experts, num_experts_per_token
from hyperagent.hardware import Machine
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.loss.distillation import default_workspace_bytes
from hyperagent_trainer.planning.machines import is_cpu
from hyperagent_trainer.planning.network_cost import NetworkCost
from hyperagent_trainer.planning.student_memory import (
    block_bytes,
    block_gradient_bytes,
    mixer_bytes,
    mixer_gradient_bytes,
)

GPU_RESERVE = 6 * 10**9
"""Bytes for the driver, NCCL and fragmentation; an assumption."""
CPU_RESERVE = 5 * 10**8
"""Bytes of the process without tensors, measured after its imports."""
# Bytes per trained parameter: weight, gradient and AdamW's two moments, float32.
_TRAINED_BYTES = 16
_AVERAGE_BYTES = 4


@dataclass(frozen=True)
class MemoryItem:
    """One item of a GPU's memory."""

    name: str
    bytes: int
    is_exact: bool
    """Whether the bytes are exact, not an estimate."""


@dataclass(frozen=True)
class Load:
    """Size of the largest micro-batch of a GPU."""

    tokens: int
    """Tokens of the micro-batch, padding included."""
    supervised_share: float
    """Share of the tokens that are supervised."""


def memory_items(
    recipe: TrainRecipe,
    model: PreTrainedModel,
    machine: Machine,
    load: Load,
    *,
    network: NetworkCost | None,
    adapter_parameters: int,
    trained_parameters: int,
) -> tuple[MemoryItem, ...]:
    """Return every item that takes memory on a GPU.

    Args:
        model: the student on the meta device.
        network: the hypernetwork; None if a static adapter is trained.
        adapter_parameters: number of parameters in one adapter.
        trained_parameters: number of parameters of the hypernetwork or the static adapter.
    """
    decoder, size, element = model.get_decoder(), model.config.get_text_config().hidden_size, element_bytes(recipe)
    tokens, layers, shards = load.tokens, decoder_layers(model), machine.gpus_per_node
    recomputes = recipe.checkpoint_activations
    # Shards are distributed within a node, and a sharded network is gathered whole for its passes.
    network_shards = shards if recipe.shard_network else 1
    gathered_network = 0 if network_shards == 1 else 8 * trained_parameters
    per_parameter = _TRAINED_BYTES + (0 if recipe.ema_decay is None else _AVERAGE_BYTES)
    state = math.ceil(trained_parameters / network_shards) * per_parameter + gathered_network
    workspace = recipe.loss_workspace_bytes or default_workspace_bytes(
        torch.device("cpu" if is_cpu(machine) else "cuda")
    )
    largest = max(parameter_bytes(layer, element) for layer in layers)
    samples = recipe.micro_batch_size
    network_kept = network.kept_bytes(recipe.max_prompt_tokens, fused_norms=not is_cpu(machine)) if network else 0
    items = (
        MemoryItem("student's layers, this GPU's shard", shard_bytes(decoder, shards, element), True),
        MemoryItem("embedding table and head, whole", _table_bytes(model, element), True),
        MemoryItem("layers gathered: one in use, one ahead", 0 if shards == 1 else 2 * largest, True),
        MemoryItem("inputs kept of all layers", len(layers) * tokens * size * element if recomputes else 0, True),
        MemoryItem("one layer run again and backward" if recomputes else "activations", _activations(recipe, model, machine, tokens), False),
        MemoryItem("loss: workspace, hidden states, gradient", workspace + round((1 + 2 * load.supervised_share) * tokens * size * element), True),
        MemoryItem("network, gradient and AdamW", state, True),
        MemoryItem("network's activations", samples * network_kept, False),
        MemoryItem("adapters and their gradients", 3 * 4 * adapter_parameters * samples, True),
        MemoryItem("router picks", _pick_bytes(model, tokens) if recomputes else 0, True),
        MemoryItem("the process itself", CPU_RESERVE, False) if is_cpu(machine) else MemoryItem("driver, NCCL, fragmentation", GPU_RESERVE, False),
    )  # fmt: skip
    return tuple(item for item in items if item.bytes)


def shard_bytes(decoder: nn.Module, shards: int, element: int) -> int:
    """Return the bytes of the largest shard of the decoder without its embedding table.

    Parameters are cut along their first dimension, as FSDP2 cuts them.
    """
    rows = (
        (math.ceil(p.shape[0] / shards), p.shape[1:])
        for n, p in decoder.named_parameters()
        if not n.startswith("embed_tokens.")
    )
    return element * sum(first * math.prod(rest) for first, rest in rows)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the student's decoder layers in order."""
    found: nn.ModuleList = model.get_decoder().layers
    return found


def element_bytes(recipe: TrainRecipe) -> int:
    """Return the bytes of one number in the student's dtype."""
    return 4 if recipe.student_dtype == "float32" else 2


def parameter_bytes(module: nn.Module, element: int) -> int:
    """Return the bytes of a module's parameters, each of `element` bytes."""
    return element * sum(p.numel() for p in module.parameters())


def _table_bytes(model: PreTrainedModel, element: int) -> int:
    tables: list[Tensor] = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]  # type: ignore[list-item]
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        tables.pop()
    return element * sum(table.numel() for table in tables)


def _pick_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of the kept router picks, 16 bits each."""
    return 2 * tokens * num_experts_per_token(model.config.get_text_config()) * len(expert_blocks(model))


def _activations(recipe: TrainRecipe, model: PreTrainedModel, machine: Machine, tokens: int) -> int:
    """Return the bytes kept inside decoder layers, plus the extra bytes held during one layer's backward pass.

    With recomputation one layer at a time keeps its activations, otherwise all layers do.
    """
    config, element = model.config.get_text_config(), element_bytes(recipe)
    kinds = layer_types(config)
    kept = {kind: mixer_bytes(config, kind, element=element, kernels=not is_cpu(machine)) for kind in kinds}
    extra = {kind: mixer_gradient_bytes(config, kind, element=element) for kind in kept}
    block, block_extra = block_bytes(config, element=element), block_gradient_bytes(config, element=element)
    if not recipe.checkpoint_activations:
        inside = sum(kept[kind] + block for kind in kinds)
        return round(tokens * (inside + max(extra.values()) + block_extra))
    has_tiles = num_experts(config) and recipe.moe_tile_tokens is not None
    at_once = min(tokens, recipe.moe_tile_tokens or tokens) if has_tiles else tokens
    # Tiles keep their inputs, and their outputs are concatenated.
    tiles = 2 * element * config.hidden_size * tokens if at_once < tokens else 0
    return round(tokens * max(kept[kind] + extra[kind] for kind in kept) + at_once * (block + block_extra) + tiles)
