"""Folder of a run: the interface between the training process and its supervisor.

request.json      the caller's request; used by the supervisor only
recipe.json       the resolved recipe; the supervisor writes it, the training process reads it
process.json      the current or last training process; used by the supervisor only
control.json      commands to a running training process: see `hyperagent_trainer.runs.commands`
status.json       written by the training process while one is running, else by the supervisor; replaced atomically
preflight.json    measurements of the pre-flight check before training
metrics.jsonl     one line per step and per evaluation; a resumed run first removes those of steps it repeats
tensorboard/      event files, if the recipe names this logger
wandb/            a folder per start for `wandb sync` of offline runs, if the recipe names this logger
log.txt           the training process's stdout and stderr
errors/           rank-0.txt etc.: the tracebacks of ranks that failed
checkpoints/      step-00000200/ etc.: network, optimizer and step; the most recent ones and, with `patience`, the best
bundle/           at the end of a hypernetwork's run: everything the adapter service needs
adapter/          at the end of a static adapter's run: the adapter in PEFT's format
verdict.json      after `hyperagent evaluate` of the run: whether conditioning pays
evaluation/       of a run that compares others: the report, as `hyperagent evaluate` writes it
probe.safetensors at the end: a prompt, tokens and logits, for verifying the bundle in another process
"""

from __future__ import annotations

import re
from pathlib import Path

from hyperagent.errors import CorruptRecord, NotFound
from hyperagent.http.run_models import RunStatus, RunVerdict
from hyperagent.storage.files import write_atomically
from hyperagent_trainer.config import TrainRecipe

_CHECKPOINT = re.compile(r"step-(\d{8,})")


class RunFolder:
    """Paths of one run's files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.request = root / "request.json"
        self.recipe = root / "recipe.json"
        self.process = root / "process.json"
        self.control = root / "control.json"
        self.status = root / "status.json"
        self.metrics = root / "metrics.jsonl"
        self.preflight = root / "preflight.json"
        self.tensorboard = root / "tensorboard"
        self.log = root / "log.txt"
        self.errors = root / "errors"
        self.checkpoints = root / "checkpoints"
        self.bundle = root / "bundle"
        self.adapter = root / "adapter"
        self.probe = root / "probe.safetensors"
        self.verdict = root / "verdict.json"
        self.evaluation = root / "evaluation"

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` optimizer steps, whether or not it exists."""
        return self.checkpoints / f"step-{step:08d}"

    def saved_steps(self) -> list[int]:
        """Return the steps of all checkpoints in ascending order."""
        if not self.checkpoints.is_dir():
            return []
        found = (_CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.iterdir())
        return sorted(int(name[1]) for name in found if name)

    def read_recipe(self) -> TrainRecipe:
        """Read the resolved recipe.

        Raises:
            CorruptRecord: the recipe is missing or cannot be read.
        """
        try:
            return TrainRecipe.model_validate_json(self.recipe.read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptRecord(f"{self.recipe} is damaged; start a new run of the recipe") from error

    def write_status(self, status: RunStatus) -> None:
        """Replace the status durably.

        Raises:
            StorageError: a file operation failed.
        """
        write_atomically(self.status, status.model_dump_json(indent=2).encode() + b"\n")

    def read_status(self) -> RunStatus:
        """Read the last status written.

        Raises:
            NotFound: there is no status.
            CorruptRecord: it cannot be read.
        """
        try:
            content = self.status.read_bytes()
        except FileNotFoundError:
            raise NotFound(f"{self.root} holds no run") from None
        try:
            return RunStatus.model_validate_json(content)
        except ValueError as error:
            raise CorruptRecord(
                f"{self.status} is damaged; move {self.root} elsewhere to continue without this run"
            ) from error

    def write_verdict(self, verdict: RunVerdict) -> None:
        """Replace the verdict of the run's last evaluation.

        Raises:
            StorageError: a file operation failed.
        """
        write_atomically(self.verdict, verdict.model_dump_json(indent=2).encode() + b"\n")

    def read_verdict(self) -> RunVerdict | None:
        """Return the verdict of the run's last evaluation; None if there is none.

        Raises:
            CorruptRecord: it cannot be read.
        """
        try:
            return RunVerdict.model_validate_json(self.verdict.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CorruptRecord(f"{self.verdict} is damaged; remove it, or evaluate the run again") from error
