"""`hyperagent train`: start a run through the trainer's control endpoint and watch it."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from hyperagent.cli.display import print_result, progress_bars, stderr

_POLL_S = 0.5
_FINAL = {"done", "failed", "stopped"}


def train(
    recipe: Annotated[str, typer.Argument(help="Name of one of the trainer's recipes.")],
    server: Annotated[str, typer.Option(help="The trainer's address.")] = "http://127.0.0.1:8702",
    num_steps: Annotated[int | None, typer.Option(help="Override the recipe's number of optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Override the recipe's trajectories per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Override the recipe's peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Override the recipe's seed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Start a training run and follow it to its end; Ctrl-C stops watching, not the run."""
    from hyperagent.auth import read_token
    from hyperagent.http.client import ApiClient

    asked = {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    overrides = {name: value for name, value in asked.items() if value is not None}
    with ApiClient(server, read_token()) as client:
        run = client.post_json("/v1/runs", {"recipe": recipe, "overrides": overrides})
        try:
            run = _follow(client, run)
        except KeyboardInterrupt:
            stderr.print(
                f"The run goes on: GET {server}/v1/runs/{run['id']}; stop it with POST {server}/v1/runs/{run['id']}/stop"
            )
            raise typer.Exit(130) from None
    print_result(run, as_json=as_json)
    if run["state"] != "done":
        raise typer.Exit(1)


def _follow(client: Any, run: dict[str, Any]) -> dict[str, Any]:
    with progress_bars() as bars:
        task = bars.add_task(f"training {run['id']}", total=run["num_steps"], note=run["state"])
        while run["state"] not in _FINAL:
            time.sleep(_POLL_S)
            run = client.get_json(f"/v1/runs/{run['id']}")
            loss = "" if run["loss"] is None else f" · loss {run['loss']:.3f} · {run['tokens_per_s']:,.0f} tokens/s"
            bars.update(task, completed=run["step"], note=run["state"] + loss)
    return run
