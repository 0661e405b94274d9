"""Runs of the training process as a whole, and what they told of themselves."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.run_folder import RunFolder
from hyperagent_trainer.train import train


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
