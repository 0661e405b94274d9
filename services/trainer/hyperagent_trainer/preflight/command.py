"""Implement `hyperagent preflight`: load the student, run the checks and show the report."""

from __future__ import annotations

from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from hyperagent.cli.display import print_result
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.network.build import assemble, read_warm_start
from hyperagent_trainer.optim.optimizer import make_optimizer
from hyperagent_trainer.preflight.memory import check_weights_fit, memory_budget
from hyperagent_trainer.preflight.run import run_preflight
from hyperagent_trainer.report import PreflightReport
from hyperagent_trainer.student.attention import choose_attention
from hyperagent_trainer.student.meta import student_without_weights
from hyperagent_trainer.student.student import Student


def run(recipe: TrainRecipe, *, tokens_per_sample: int) -> PreflightReport:
    """Run the pre-flight of a recipe's student and network; a student that does not fit into memory is never loaded.

    Args:
        tokens_per_sample: length of the longest trajectory in tokens.

    Raises:
        ConfigError: the folder holds no student, or the recipe's targets are not the student's.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype: torch.dtype = getattr(torch, recipe.student_dtype)
    weights_fit = check_weights_fit(student_without_weights(recipe.student, dtype), device)
    if not weights_fit.passed:
        return PreflightReport((weights_fit,))
    student = Student(recipe.student, device=device, dtype=dtype)
    torch.manual_seed(recipe.seed)
    adapted = assemble(recipe, student, read_warm_start(recipe))
    budget = memory_budget(recipe, student, tokens_per_sample=tokens_per_sample)
    attention = choose_attention(
        student.model,
        wanted=recipe.attention,
        device=device,
        dtype=dtype,
        num_tokens=tokens_per_sample,
        earlier=None,
    )
    with attention.in_use(student.model):
        return run_preflight(adapted, partial(make_optimizer, recipe=recipe), budget, attention=attention.check)


def show(report: PreflightReport, *, as_json: bool) -> None:
    """Print the report: JSON for programs, a table for people with the remedies of the failed checks."""
    if as_json:
        print_result(report.to_json(), as_json=True)
        return
    table = Table(box=None, show_lines=False, pad_edge=False)
    for heading in ("", "check", "found", "wanted"):
        table.add_column(heading, overflow="fold")
    for check in report.checks:
        table.add_row("[green]ok[/]" if check.passed else "[red]FAIL[/]", check.name, check.found, check.bound)
    console = Console()
    console.print(table)
    for check in report.checks:
        if not check.passed:
            console.print(f"{check.name}: {check.remedy}", style="red", markup=False, highlight=False)
