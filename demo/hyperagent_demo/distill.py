"""Distill: train the hypernetwork and the two runs that it is compared with, over the trainer's REST interface.

The hypernetwork has a trainer service of its own, so that it trains beside the two controls, each with one thread: these
models are too small to gain from a second one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hyperagent.errors import ServiceError
from hyperagent.http.run_client import RunClient
from hyperagent.http.run_models import RunBody, RunRequest
from hyperagent.storage.files import write_atomically
from hyperagent_demo.config import DemoConfig
from hyperagent_demo.processes import ServiceProcess, free_port, service
from hyperagent_demo.stages import Bar

_HYPERNETWORK, _STATIC, _TRAINED_ON_SHUFFLED = "demo", "static", "trained_on_shuffled"
"""Names of the recipes; those of static runs are numbered."""

_Follow = Callable[[str, RunBody], None]
"""Called with a recipe's name and the state of its run."""


@dataclass(frozen=True)
class Distilled:
    """The finished runs."""

    run: RunBody
    """The hypernetwork's run."""
    metrics: list[dict[str, Any]]
    """Every line of its metrics."""
    folder: Path
    """Folder of the hypernetwork's run."""
    static: Path
    """Folder of the best static run."""
    trained_on_shuffled: Path
    """Folder of the run on shuffled prompts."""


def distill(
    config: DemoConfig, student: Path, *, tokens: Path, cache: Path, out: Path, token: str, bar: Bar
) -> Distilled:
    """Write the recipes, train them and follow the runs to their end.

    Args:
        student: folder of the student's model.
        out: folder of the demo; recipes, runs and logs go into folders of it.
        token: access token for the trainer services.

    Raises:
        ServiceError: a run did not end as "done", or a service has ended.
    """
    recipes = _recipes(config, student, tokens, cache)
    for name, recipe in recipes.items():
        write_atomically(out / "recipes" / f"{name}.yaml", yaml.safe_dump(recipe, sort_keys=False).encode())
    total = sum(recipe["num_steps"] for recipe in recipes.values())
    steps: dict[str, int] = {}

    def follow(name: str, run: RunBody) -> None:
        steps[name] = run.step
        bar.update(sum(steps.values()), total, f"{name} {run.progress_note}")

    with ThreadPoolExecutor(2) as pool:
        own = pool.submit(_train, [_HYPERNETWORK], out, "runs", token, follow)
        controls = pool.submit(
            _train, [name for name in recipes if name != _HYPERNETWORK], out, "controls", token, follow
        )
        trained = {**own.result(), **controls.result()}
    run, metrics, folder = trained.pop(_HYPERNETWORK)
    _, _, shuffled = trained.pop(_TRAINED_ON_SHUFFLED)
    _, _, static = min(trained.values(), key=lambda found: found[0].held_out_kl["adapter"] or math.inf)
    return Distilled(run, metrics, folder, static, shuffled)


def _recipes(config: DemoConfig, student: Path, tokens: Path, cache: Path) -> dict[str, dict[str, Any]]:
    own = {
        "student": str(student.resolve()),
        "tokens": str(tokens.resolve()),
        "cache": str(cache.resolve()),
        "max_prompt_tokens": config.views.max_prompt_tokens,
        "seed": config.seed,
        "checkpoint_every": config.distill.evaluate_every,
        **config.distill.model_dump(mode="json"),
    }

    def control(num_steps: int, **changes: Any) -> dict[str, Any]:
        return {**own, "num_steps": num_steps, "evaluate_every": num_steps, **changes}

    static = {
        f"{_STATIC}-{number}": control(
            config.static.num_steps, arm="static", learning_rate=rate, b_head_learning_rate_factor=1.0
        )
        for number, rate in enumerate(config.static.learning_rates, start=1)
    }
    shuffled = control(config.distill.num_steps, prompts="shuffled")
    return {_HYPERNETWORK: own, **static, _TRAINED_ON_SHUFFLED: shuffled}


def _train(
    recipes: list[str], out: Path, runs: str, token: str, follow: _Follow
) -> dict[str, tuple[RunBody, list[dict[str, Any]], Path]]:
    """Serve a trainer and run the recipes one after the other; returns run, metrics and folder of each."""
    port = free_port()
    arguments = ["--recipes", str(out / "recipes"), "--runs", str(out / runs), "--port", str(port)]
    found = {}
    with (
        service("trainer", arguments, log=out / "logs" / f"trainer-{runs}.txt", token=token, threads=1) as process,
        RunClient(f"http://127.0.0.1:{port}", token) as trainer,
    ):
        process.wait_until_ready(trainer.wait_until_ready)
        for name in recipes:
            run = _to_its_end(trainer, trainer.start(RunRequest(recipe=name)), process, name, follow)
            folder = out / runs / run.id
            if run.state != "done":
                raise ServiceError(f"the training run {run.state}: {run.reason}; see {folder / 'log.txt'}")
            found[name] = run, trainer.metrics(run.id).metrics, folder
    return found


def _to_its_end(trainer: RunClient, started: RunBody, process: ServiceProcess, name: str, follow: _Follow) -> RunBody:
    run = started
    try:
        for run in trainer.follow(started.id):
            follow(name, run)
    except ServiceError:
        process.require_alive()  # the last line of its log says more than a refused connection
        raise
    return run
