"""Run whole trainings and read their results."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.control.process import training_command
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.training.trainer import train

# Training checks for a stop after the imports, the student and the pre-flight.
_CHECKS_WHILE_LOADING = 3


class StopAfter(threading.Event):
    """Stop event that is set once a run has done `count` steps."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._left = count + _CHECKS_WHILE_LOADING

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


def run(recipe: TrainRecipe, root: Path, stop: threading.Event | None = None) -> RunFolder:
    root.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(root)
    train(recipe, folder, stop or threading.Event())
    return folder


def metrics(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def losses(folder: RunFolder) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(folder) if "loss" in line}


def last_checkpoint(folder: RunFolder) -> Path:
    return folder.checkpoint(folder.saved_steps()[-1])


def start_worker(recipe: TrainRecipe, root: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start the training process, or torchrun over several processes, with these environment variables."""
    root.mkdir()
    folder = RunFolder(root)
    folder.recipe.write_text(recipe.model_dump_json())
    with folder.log.open("wb") as log:
        return subprocess.Popen(
            [*training_command(recipe.processes, stop_grace_s=60), str(root)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        )
