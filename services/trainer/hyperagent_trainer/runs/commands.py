"""Commands of the supervisor to a running training process, in the run's `control.json`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from hyperagent.config import StrictModel
from hyperagent.errors import CorruptRecord
from hyperagent.storage.files import write_atomically


class RunCommands(StrictModel):
    """Contents of `control.json`; a missing file means no commands."""

    pause: bool = False
    """Whether the run shall save a checkpoint and pause for as long as this is set."""
    checkpoints: int = Field(0, ge=0)
    """Number of checkpoints requested since the training process was started."""


def read_commands(path: Path) -> RunCommands:
    """Read the current commands.

    Raises:
        CorruptRecord: the file cannot be read.
    """
    try:
        return RunCommands.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return RunCommands()
    except ValueError as error:
        raise CorruptRecord(f"{path} is damaged; delete it to continue without its commands") from error


def write_commands(path: Path, commands: RunCommands) -> None:
    """Replace the current commands.

    Raises:
        StorageError: a file operation failed.
    """
    write_atomically(path, commands.model_dump_json().encode() + b"\n")
