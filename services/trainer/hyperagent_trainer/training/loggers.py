"""Where a run's metrics go besides `metrics.jsonl`, by the recipe's choice: TensorBoard, Weights & Biases.

A line of the metrics becomes numbers by name, nested ones as `grad_norms/encoder`, at the line's step; what is no number
is left out. The packages are extras of this distribution, imported with the first line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from hyperagent.errors import ConfigError
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.runs.folder import RunFolder

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter

log = structlog.get_logger()


class MetricLogger(Protocol):
    """One place that metrics go to."""

    failures: tuple[type[Exception], ...]
    """What its package raises where it cannot write."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log one line; steps never fall. Lines logged by an earlier process for this first step and later ones are stale."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoardLogger:
    """Event files in the run's `tensorboard/`, through the writer that torch brings."""

    def __init__(self, folder: RunFolder) -> None:
        from tensorboard.compat import tf

        # Where TensorFlow is installed, its file system is what TensorBoard writes with.
        self.failures: tuple[type[Exception], ...] = (OSError, tf.errors.OpError)
        self._folder = folder.tensorboard
        self._writer: SummaryWriter | None = None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        # A killed process resumes from a checkpoint, and does not log the steps before it again.
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbLogger:
    """A run of Weights & Biases in the run's `wandb/`, with its name as id; offline unless WANDB_MODE says otherwise.

    A resumed run keeps its id. Weights & Biases keeps the first numbers logged for a step; the steps that are done again
    give the same ones.
    """

    def __init__(self, folder: RunFolder, recipe: TrainRecipe) -> None:
        # By default it sends reports about itself even when offline; it looks when it is imported.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        # The last two when its process has died; ValueError for a variable that it cannot read.
        self.failures: tuple[type[Exception], ...] = (
            OSError,
            ValueError,
            wandb.Error,
            HandleAbandonedError,
            MailboxClosedError,
        )
        self._folder = folder
        self._recipe = recipe
        self._run: wandb.Run | None = None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        import wandb

        if self._run is None:
            self._run = wandb.init(
                dir=self._folder.root,
                id=self._folder.root.name,
                name=self._folder.root.name,
                resume="allow",
                mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]  # it checks this itself
                config=self._recipe.model_dump(mode="json"),
                # The metrics and the recipe, and nothing of the machine, its code or what it prints.
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    save_code=False,
                    x_disable_stats=True,
                    x_disable_machine_info=True,
                    x_save_requirements=False,
                ),
            )
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def require_installed(names: Sequence[str]) -> None:
    """Refuse loggers whose packages are not here.

    Raises:
        ConfigError: naming the extra to install.
    """
    for name in names:
        spec = find_spec(name)
        # A folder of that name in the working directory, such as wandb's own, passes for a package without code.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"the recipe's loggers name {name}, which is not installed; "
                f"install it with `pip install 'hyperagent-trainer[{name}]'`, or leave it out"
            )


class Loggers:
    """All loggers of a run. One that fails is left out from then on: no reason to end a run of many hours."""

    def __init__(self, loggers: Mapping[str, MetricLogger]) -> None:
        self._loggers = dict(loggers)

    @classmethod
    def of(cls, recipe: TrainRecipe, folder: RunFolder) -> Loggers:
        """Those that the recipe names, for the rank that writes."""
        made: dict[str, MetricLogger] = {}
        for name in recipe.loggers:
            made[name] = TensorBoardLogger(folder) if name == "tensorboard" else WandbLogger(folder, recipe)
        return cls(made)

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass a line of the metrics, which has a "step", to every logger."""
        scalars = {name: value for name, value in _scalars(line) if name != "step"}
        self._each(lambda logger: logger.log(line["step"], scalars))

    def close(self) -> None:
        """Write what is left; nothing may be logged afterwards."""
        self._each(lambda logger: logger.close())

    def _each(self, act: Callable[[MetricLogger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                act(logger)
            except logger.failures as error:
                del self._loggers[name]
                log.warning("metrics go there no longer", logger=name, error=str(error))


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
