"""The trainer's commands: `hyperagent preflight`, `plan`, `evaluate` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def preflight(
    student: Annotated[
        Path | None, typer.Option(help="Folder of a student; all else as a recipe has it by default.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe; its tokens and cache are not read.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per trajectory, for the estimate of the memory.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Prove that a student can be trained before it is: gradients, zero start, targets, routing, memory; exits 1 if not."""
    from hyperagent.errors import ConfigError
    from hyperagent.logs import configure_logging
    from hyperagent_trainer.config import TrainRecipe, load_recipe
    from hyperagent_trainer.preflight.command import run, show

    if (student is None) == (recipe is None):
        raise ConfigError("give either --student FOLDER or --recipe FILE")
    # Only the student of a recipe is looked at here; the other two paths have to be named, and are not opened.
    chosen = load_recipe(recipe) if recipe else TrainRecipe(student=student, tokens=student, cache=student)
    configure_logging(service="preflight")
    report = run(chosen, tokens_per_sample=tokens)
    show(report, as_json=as_json)
    if not report.passed:
        raise typer.Exit(1)


def plan(
    recipe: Annotated[Path, typer.Option(help="The recipe; its cache is not read, of its student config.json alone.")],
    machine: Annotated[str, typer.Option(help="Such as 8xh200, 4x8xh200 (nodes) or 1xcpu.")],
    data: Annotated[Path | None, typer.Option(help="A tokens file, instead of the recipe's.")] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the peak that work reaches; recomputation is no work.")
    ] = 0.23,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="To compute a cost.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what a run will need of a machine: memory of each GPU, operations, days; exits 1 if it does not fit."""
    from hyperagent.errors import ConfigError
    from hyperagent_trainer.config import load_recipe
    from hyperagent_trainer.planning.command import explain_shortfall, show
    from hyperagent_trainer.planning.command import plan as make

    chosen = load_recipe(recipe)
    if data is not None:
        chosen = chosen.model_copy(update={"tokens": data})
    found = make(chosen, machine, mfu=mfu)
    show(found, price=price_per_gpu_hour, as_json=as_json)
    if not found.fits:
        raise ConfigError(explain_shortfall(found))


def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Folders of hypernetwork runs that differ in their seed only.")],
    out: Annotated[Path, typer.Option(help="Folder to write evaluation.json, .md and .html to.")],
    static: Annotated[
        list[Path] | None, typer.Option(help="Folder of a static run; repeatable, one for each seed.")
    ] = None,
    trained_on_shuffled: Annotated[
        list[Path] | None, typer.Option(help="Folder of a run with `prompts: shuffled`; repeatable, one for each seed.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the tokens file to evaluate on.")] = "held_out",
    margin: Annotated[
        float, typer.Option(min=0, max=0.99, help="Least advantage that counts, as a share of the frozen student's KL.")
    ] = 0.05,
    teacher_check: Annotated[
        Path | None, typer.Option(help="Result of `hyperagent teacher-check compare --json`.")
    ] = None,
    dependent_rows: Annotated[
        Path | None, typer.Option(help="Rows that depend on the condition, as the teacher check writes them.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffled prompts and the intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare runs on held-out repositories, and decide whether conditioning on the prompt pays."""
    from hyperagent.cli.display import add_bar, progress_bars
    from hyperagent.logs import configure_logging
    from hyperagent_trainer.comparison.command import EvaluationRequest, show, write_report
    from hyperagent_trainer.comparison.command import evaluate as compare
    from hyperagent_trainer.comparison.keep_verdict import keep_verdict

    configure_logging(service="evaluate")
    request = EvaluationRequest(
        own=runs,
        static=static or (),
        trained_on_shuffled=trained_on_shuffled or (),
        split=split,
        margin=margin,
        teacher_check=teacher_check,
        dependent_rows=dependent_rows,
        seed=seed,
    )
    with progress_bars() as bars:
        report = compare(request, progress=add_bar(bars, "evaluate", unit="trajectories, in every arm"))
    write_report(out, report)
    show(report, out, as_json=as_json)
    keep_verdict(runs, report, out)


def export(
    run: Annotated[Path, typer.Argument(help="Folder of the run, whatever its state.")],
    out: Annotated[Path, typer.Option(help="Folder to write, which must not exist.")],
    checkpoint: Annotated[
        Literal["last", "best"] | None,
        typer.Option(help="Which one; by default the best if the recipe has `patience`, or else the last."),
    ] = None,
    mean: Annotated[
        bool,
        typer.Option(
            "--mean", help="Write one adapter: the mean over training prompts, for when a static one suffices."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make of a run's checkpoint what the run makes at its end: a bundle, or of a static run an adapter in PEFT's format."""
    from hyperagent.cli.display import print_result
    from hyperagent.logs import configure_logging
    from hyperagent_trainer.export.command import export_run
    from hyperagent_trainer.runs.folder import RunFolder

    configure_logging(service="export")

    if mean:
        from hyperagent.errors import ConfigError
        from hyperagent_trainer.comparison.export_mean import export_mean

        if checkpoint is not None:
            raise ConfigError("--mean exports the checkpoint that the run exports; leave --checkpoint out")
        print_result(export_mean(run, out), as_json=as_json)
        return
    print_result(export_run(RunFolder(run), out, checkpoint), as_json=as_json)
