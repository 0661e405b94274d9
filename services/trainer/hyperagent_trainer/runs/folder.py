"""What a run leaves on disk, and so what the training process and its supervisor tell each other.

request.json      what the caller asked for; the supervisor's own
recipe.json       the resolved recipe; the supervisor writes it, the training process reads it
process.json      which process trains, or last did; the supervisor's own
control.json      what the supervisor asks of the training process that lives: see `hyperagent_trainer.runs.commands`
status.json       written by the training process while one lives, else by the supervisor; replaced as a whole
preflight.json    what the pre-flight measured before training started
metrics.jsonl     one line per step, one per evaluation; a resumed run first cuts those of steps it does again
tensorboard/      with the logger of that name: event files
wandb/            with the logger of that name: a folder per start, for `wandb sync` where it was offline
log.txt           the training process's stdout and stderr
checkpoints/      step-00000200/ and so on: network, optimizer and step; the last few, with `patience` also the best
bundle/           at the end of a hypernetwork's run: all that the adapter service needs
adapter/          at the end of a static adapter's run: the adapter in PEFT's format
probe.safetensors at the end: a prompt, tokens and logits, to prove the bundle by in another process
"""

from __future__ import annotations

import re
from pathlib import Path

from hyperagent.errors import CorruptRecord, NotFound
from hyperagent.http.run_models import RunStatus
from hyperagent.storage.files import write_atomically
from hyperagent_trainer.config import TrainRecipe

_CHECKPOINT = re.compile(r"step-(\d{8,})")


class RunFolder:
    """The files of one run by name."""

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
        self.checkpoints = root / "checkpoints"
        self.bundle = root / "bundle"
        self.adapter = root / "adapter"
        self.probe = root / "probe.safetensors"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after `step` optimizer steps lies, if there is one."""
        return self.checkpoints / f"step-{step:08d}"

    def saved_steps(self) -> list[int]:
        """The steps there are checkpoints of, the last at the end."""
        if not self.checkpoints.is_dir():
            return []
        found = (_CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.iterdir())
        return sorted(int(name[1]) for name in found if name)

    def read_recipe(self) -> TrainRecipe:
        """The resolved recipe.

        Raises:
            CorruptRecord: it is missing or cannot be read.
        """
        try:
            return TrainRecipe.model_validate_json(self.recipe.read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptRecord(f"{self.recipe} is damaged; start a new run of the recipe") from error

    def write_status(self, status: RunStatus) -> None:
        """Replace the status, durably.

        Raises:
            StorageError: the file system refused.
        """
        write_atomically(self.status, status.model_dump_json(indent=2).encode() + b"\n")

    def read_status(self) -> RunStatus:
        """The last status written.

        Raises:
            NotFound: there is none.
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
                f"{self.status} is damaged; move {self.root} elsewhere to go on without this run"
            ) from error
