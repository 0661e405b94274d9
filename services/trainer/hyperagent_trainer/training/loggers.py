"""Optional loggers of a run's metrics in addition to `metrics.jsonl`: TensorBoard, Weights & Biases.

Each line of the metrics is logged as named numbers at the line's step, nested ones as `grad_norms/encoder`; other values
are omitted. The packages are extras of this distribution and are imported with the first line.
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
    """Interface of a metrics logger."""

    failures: tuple[type[Exception], ...]
    """Exceptions that its package raises if it cannot write."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log one line; steps never decrease. Lines that an earlier process logged from the first step on are stale."""
        ...

    def close(self) -> None:
        """Flush and close the logger."""
        ...


class TensorBoardLogger:
    """Write event files to the run's `tensorboard/` with torch's writer."""

    def __init__(self, folder: RunFolder) -> None:
        from tensorboard.compat import tf

        # If TensorFlow is installed, TensorBoard writes through its file system.
        self.failures: tuple[type[Exception], ...] = (OSError, tf.errors.OpError)
        self._folder = folder.tensorboard
        self._writer: SummaryWriter | None = None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        # A killed process resumes from a checkpoint and does not log the steps before it again.
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbLogger:
    """Log to Weights & Biases in the run's `wandb/`, with the run's name as id; offline unless WANDB_MODE is set.

    A resumed run keeps its id. Weights & Biases keeps the first numbers logged for a step; repeated steps produce the
    same ones.
    """

    def __init__(self, folder: RunFolder, recipe: TrainRecipe) -> None:
        # By default it sends error reports even when offline; the variable is read at import.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        # The last two occur if its process has died, and ValueError for an invalid variable.
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
                # Log only the metrics and the recipe, nothing about the machine, its code or its output.
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
    """Require that the packages of all `loggers` are installed.

    Raises:
        ConfigError: a package is missing; the message names the extra to install.
    """
    for name in names:
        spec = find_spec(name)
        # A folder of that name in the working directory, such as wandb's own, looks like a namespace package.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"the recipe's loggers name {name}, which is not installed; "
                f"install it with `pip install 'hyperagent-trainer[{name}]'`, or leave it out"
            )


class Loggers:
    """All loggers of a run. A logger that fails is dropped, because it must not end a run of many hours."""

    def __init__(self, loggers: Mapping[str, MetricLogger]) -> None:
        self._loggers = dict(loggers)

    @classmethod
    def of(cls, recipe: TrainRecipe, folder: RunFolder) -> Loggers:
        """Create the loggers that the recipe names, on the rank that writes."""
        made: dict[str, MetricLogger] = {}
        for name in recipe.loggers:
            made[name] = TensorBoardLogger(folder) if name == "tensorboard" else WandbLogger(folder, recipe)
        return cls(made)

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass a line of the metrics, which contains "step", to every logger."""
        scalars = {name: value for name, value in _scalars(line) if name != "step"}
        self._each(lambda logger: logger.log(line["step"], scalars))

    def close(self) -> None:
        """Flush and close all loggers; nothing may be logged afterwards."""
        self._each(lambda logger: logger.close())

    def _each(self, act: Callable[[MetricLogger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                act(logger)
            except logger.failures as error:
                del self._loggers[name]
                log.warning("logger dropped after an error", logger=name, error=str(error))


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
