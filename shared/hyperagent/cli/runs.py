"""`hyperagent runs`: list, follow and steer the runs of a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hyperagent.cli.display import print_result
from hyperagent.cli.train import follow_run
from hyperagent.services import Service

if TYPE_CHECKING:
    from hyperagent.http.run_client import RunClient
    from hyperagent.http.run_models import RunBody

app = typer.Typer(help="List, follow and steer the trainer's runs.", no_args_is_help=True)

_RunId = Annotated[str, typer.Argument(help="Id of the run, as `hyperagent runs ls` prints it.")]
_Server = Annotated[str, typer.Option(help="URL of the trainer.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("ls")
def list_runs(server: _Server = Service.TRAINER.default_address, as_json: _AsJson = False) -> None:
    """List all runs, newest first."""
    with _client(server) as client:
        runs = client.runs()
    if as_json:
        print_result({"runs": [run.model_dump(mode="json") for run in runs]}, as_json=True)
        return
    for run in runs:
        typer.echo(f"{run.id}  {run.state:8}  {f'{run.step:,}/{run.num_steps:,}':>15}  {run.recipe[:28]}")


@app.command()
def show(run: _RunId, server: _Server = Service.TRAINER.default_address, as_json: _AsJson = False) -> None:
    """Print one run's state, progress and last evaluation."""
    with _client(server) as client:
        _print(client.get(run), as_json=as_json)


@app.command()
def follow(run: _RunId, server: _Server = Service.TRAINER.default_address, as_json: _AsJson = False) -> None:
    """Follow a run until it ends; Ctrl-C stops following, not the run. Exits 1 unless the run is done."""
    with _client(server) as client:
        ended = follow_run(client, client.get(run))
    _print(ended, as_json=as_json)
    if ended.state != "done":
        raise typer.Exit(1)


@app.command()
def stop(run: _RunId, server: _Server = Service.TRAINER.default_address, as_json: _AsJson = False) -> None:
    """Save a checkpoint and stop the run, or take it out of the queue."""
    with _client(server) as client:
        _print(client.stop(run), as_json=as_json)


@app.command()
def pause(run: _RunId, server: _Server = Service.TRAINER.default_address, as_json: _AsJson = False) -> None:
    """Save a checkpoint before the next step and pause the run."""
    with _client(server) as client:
        _print(client.pause(run), as_json=as_json)


@app.command()
def resume(run: _RunId, server: _Server = Service.TRAINER.default_address, as_json: _AsJson = False) -> None:
    """Continue a paused run, or a stopped or failed run from its last checkpoint."""
    with _client(server) as client:
        _print(client.resume(run), as_json=as_json)


def _client(server: str) -> RunClient:
    from hyperagent.auth import read_token
    from hyperagent.http.run_client import RunClient

    return RunClient(server, read_token())


def _print(run: RunBody, *, as_json: bool) -> None:
    print_result(run.model_dump(mode="json"), as_json=as_json)
