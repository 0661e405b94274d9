"""Implement `hyperagent plan`: read the config and the lengths, compute the plan and show it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from hyperagent.cli.display import print_result
from hyperagent.data.files.tokens_file import TRAIN, read_tokens
from hyperagent.errors import DataError
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.targets import discover_target_layers, num_adapter_parameters
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.planning.flops import Trained, Trajectories
from hyperagent_trainer.planning.machines import machine_named
from hyperagent_trainer.planning.network_cost import NetworkCost
from hyperagent_trainer.planning.plan import Plan, make_plan
from hyperagent_trainer.student.meta import student_without_weights


def plan(recipe: TrainRecipe, machine: str, *, mfu: float) -> Plan:
    """Make the plan of a recipe; only config.json is read from the student's folder.

    Args:
        machine: name of the machine, such as "8xh200".
        mfu: share of the peak that is assumed to be reached, see `make_plan`.

    Raises:
        ConfigError: the machine is unknown, or the folder holds no student.
        DataError: the tokens file cannot be read, or has no training split.
    """
    chosen = machine_named(machine)
    model = student_without_weights(recipe.student, getattr(torch, recipe.student_dtype))
    read = list(read_tokens(recipe.tokens, split=TRAIN))
    if not read:
        raise DataError(f"{recipe.tokens} has no trajectory in the {TRAIN} split")
    trajectories = Trajectories(
        tokens=[len(t.student_ids) for t in read],
        supervised=[len(t.positions) for t in read],
        prompts=[len(t.prompt_ids) for t in read],
    )
    return make_plan(recipe, model, trainable_network(recipe, model), chosen, trajectories, mfu=mfu)


def trainable_network(recipe: TrainRecipe, model: PreTrainedModel) -> Trained:
    """Return the sizes of the recipe's network for a student on the meta device.

    Raises:
        ConfigError: the recipe's targets are not the student's.
    """
    layers = discover_target_layers(model, recipe.targets)
    adapter = num_adapter_parameters(layers, recipe.hypernetwork.rank)
    if recipe.arm == "static":
        return Trained(adapter, adapter, None)
    size = model.config.get_text_config().hidden_size
    with torch.device("meta"):
        network = AgenticHyperNetwork(recipe.hypernetwork, layers, size)
    cost = NetworkCost(recipe.hypernetwork, len(layers), adapter, size)
    return Trained(adapter, sum(p.numel() for p in network.parameters()), cost)


def show(found: Plan, *, price: float | None, as_json: bool) -> None:
    """Print the plan: JSON for programs, tables for people.

    Args:
        price: price of one GPU for an hour; None shows no cost.
    """
    summary = _summary(found, price)
    if as_json:
        print_result({**asdict(found), **summary}, as_json=True)
        return
    memory = _table("memory of each GPU", "GB", "")
    for item in found.memory:
        memory.add_row(item.name, f"{item.bytes / 1e9:.2f}", "" if item.is_exact else "estimate")
    memory.add_row("total", f"{found.memory_total / 1e9:.2f}", f"of {found.memory_available / 1e9:.0f}", style="bold")
    operations = _table("operations of a step", "TFLOP", "%")
    for name, flops in found.operations.items():
        operations.add_row(name, f"{flops / 1e12:,.3f}", f"{100 * flops / found.flops_per_step:.1f}")
    operations.add_row("total", f"{found.flops_per_step / 1e12:,.3f}", "", style="bold")
    console = Console()
    for part in (memory, "", operations, ""):
        console.print(part)
    print_result({"steps": found.num_steps, **summary}, as_json=False)
    console.print("\nassumed:", *(f"  {line}" for line in found.assumptions), sep="\n", soft_wrap=True)


def _table(first: str, second: str, third: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    table.add_column(second, justify="right")
    table.add_column(third)
    return table


def _summary(found: Plan, price: float | None) -> dict[str, Any]:
    return {
        "fits": found.fits,
        "tokens per step": round(found.tokens_per_step),
        "GPUs busy": f"{found.step_efficiency:.1%}",
        "seconds per step": round(found.step_s, 3),
        "of them summing gradients": round(found.reduce_s, 3),
        "gathering, overlapped": round(found.gather_s, 3),
        "days": round(found.days, 3),
        **({} if price is None else {"cost": round(found.days * 24 * found.num_gpus * price, 2)}),
    }


def explain_shortfall(found: Plan) -> str:
    """Explain how much memory is missing, what takes most of it, and how to fix it."""
    largest = sorted(found.memory, key=lambda item: -item.bytes)[:3]
    return (
        f"a GPU would need {found.memory_total / 1e9:.1f} GB and has {found.memory_available / 1e9:.0f}; most goes to "
        + ", ".join(f"{item.name} ({item.bytes / 1e9:.1f} GB)" for item in largest)
        + "; take more GPUs or a larger one, shorter trajectories, student_dtype bfloat16, checkpoint_activations, "
        "smaller moe_tile_tokens or shard_network"
    )
