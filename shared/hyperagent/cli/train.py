"""`hyperagent train`: start a run through the trainer's control endpoint and watch it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hyperagent.cli.display import print_result, progress_bars, stderr
from hyperagent.services import Service

if TYPE_CHECKING:
    from hyperagent.http.run_client import RunClient
    from hyperagent.http.run_models import RunBody


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe of the trainer.")],
    server: Annotated[str, typer.Option(help="URL of the trainer.")] = Service.TRAINER.default_address,
    num_steps: Annotated[int | None, typer.Option(help="Override the recipe's number of optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Override the recipe's trajectories per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Override the recipe's peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Override the recipe's seed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Start a training run and follow it until it ends; Ctrl-C stops following, not the run."""
    from hyperagent.auth import read_token
    from hyperagent.config import parse
    from hyperagent.http.run_client import RunClient
    from hyperagent.http.run_models import RunRequest

    overrides = {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    request = parse({"recipe": recipe, "overrides": overrides}, RunRequest, source="hyperagent train")
    with RunClient(server, read_token()) as client:
        run = follow_run(client, client.start(request))
    print_result(run.model_dump(mode="json"), as_json=as_json)
    if run.state != "done":
        raise typer.Exit(1)


def follow_run(client: RunClient, started: RunBody) -> RunBody:
    """Show a run's progress until it ends, and return it; on Ctrl-C, say how to follow and stop it, and exit with 130."""
    try:
        return _follow(client, started)
    except KeyboardInterrupt:
        stderr.print(
            f"The run continues. Follow it: hyperagent runs follow {started.id}; stop it: hyperagent runs stop {started.id} "
            "(with the same --server)"
        )
        raise typer.Exit(130) from None


def _follow(client: RunClient, started: RunBody) -> RunBody:
    with progress_bars() as bars:
        task = bars.add_task(f"training {started.id}", total=started.num_steps, note=started.state)
        run = started
        for run in client.follow(started.id):
            bars.update(task, completed=run.step, note=run.progress_note)
    return run
