"""What `hyperagent plan` does: read the config and the lengths, compute, show."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hyperagent.cli.display import print_result
from hyperagent.data.tokens import TRAIN, read_tokens
from hyperagent.errors import DataError
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.targets import discover_target_layers, num_adapter_parameters
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.plan import Plan, make_plan
from hyperagent_trainer.plan_machines import machine_named
from hyperagent_trainer.student_skeleton import student_without_weights


def plan(recipe: TrainRecipe, machine: str, *, mfu: float) -> Plan:
    """The plan of a recipe; of the student's folder it reads config.json alone.

    Raises:
        ConfigError: there is no such machine, or the folder holds no student.
        DataError: the tokens file cannot be read, or has no training split.
    """
    chosen = machine_named(machine)
    model = student_without_weights(recipe.student, getattr(torch, recipe.student_dtype))
    layers = discover_target_layers(model, recipe.targets)
    with torch.device("meta"):
        network = AgenticHyperNetwork(recipe.hypernetwork, layers, model.config.get_text_config().hidden_size)
    num_parameters = sum(p.numel() for p in network.parameters())
    if recipe.arm == "static":
        num_parameters = num_adapter_parameters(layers, recipe.hypernetwork.rank)
    trajectories = [(len(t.student_ids), len(t.positions)) for t in read_tokens(recipe.tokens, split=TRAIN)]
    if not trajectories:
        raise DataError(f"{recipe.tokens} has no trajectory in the {TRAIN} split")
    lengths = [tokens for tokens, _ in trajectories]
    supervised = sum(rows for _, rows in trajectories) / sum(lengths)
    return make_plan(recipe, model, layers, num_parameters, chosen, lengths, supervised_share=supervised, mfu=mfu)


def show(found: Plan, *, num_gpus: int, price: float | None, as_json: bool) -> None:
    """The plan: JSON for programs, tables for people."""
    summary = _summary(found, num_gpus, price)
    if as_json:
        print_result({**asdict(found), **summary}, as_json=True)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("memory of each GPU")
    table.add_column("GB", justify="right")
    table.add_column("")
    for item in found.memory:
        table.add_row(item.name, f"{item.bytes / 1e9:.2f}", "" if item.is_exact else "estimate")
    table.add_row("total", f"{found.memory_total / 1e9:.2f}", f"of {found.memory_available / 1e9:.0f}", style="bold")
    Console().print(table)
    print_result({"steps": found.num_steps, **summary}, as_json=False)


def _summary(found: Plan, num_gpus: int, price: float | None) -> dict[str, Any]:
    return {
        "fits": found.fits,
        "tokens per step": round(found.tokens_per_step),
        "operations per step, PFLOP": round(found.flops_per_step / 1e15, 3),
        "GPUs busy": f"{found.step_efficiency:.1%}",
        "seconds per step": round(found.step_s, 3),
        "of them gathering, overlapped": round(found.gather_s, 3),
        "days": round(found.days, 3),
        **({} if price is None else {"cost": round(found.days * 24 * num_gpus * price, 2)}),
    }


def why_it_does_not_fit(found: Plan) -> str:
    """What is short, what takes most, and how to mend it."""
    largest = sorted(found.memory, key=lambda item: -item.bytes)[:3]
    return (
        f"a GPU would need {found.memory_total / 1e9:.1f} GB and has {found.memory_available / 1e9:.0f}; most goes to "
        + ", ".join(f"{item.name} ({item.bytes / 1e9:.1f} GB)" for item in largest)
        + "; take more GPUs or a larger one, shorter trajectories, student_dtype bfloat16, checkpoint_activations, "
        "smaller moe_tile_tokens or shard_network"
    )
