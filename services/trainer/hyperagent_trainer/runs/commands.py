"""What the supervisor asks of the training process that lives, in the run's `control.json`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from hyperagent.config import StrictModel
from hyperagent.errors import CorruptRecord
from hyperagent.storage.files import write_atomically


class RunCommands(StrictModel):
    """What `control.json` holds; without the file, nothing is asked for."""

    pause: bool = False
    """Save and wait for as long as this is set."""
    checkpoints: int = Field(0, ge=0)
    """How many checkpoints have been asked for since the training process was started."""


def read_commands(path: Path) -> RunCommands:
    """What is asked for now.

    Raises:
        CorruptRecord: the file cannot be read.
    """
    try:
        return RunCommands.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return RunCommands()
    except ValueError as error:
        raise CorruptRecord(f"{path} is damaged; delete it to go on, what it asked for is then void") from error


def write_commands(path: Path, commands: RunCommands) -> None:
    """Replace what is asked for.

    Raises:
        StorageError: the file system refused.
    """
    write_atomically(path, commands.model_dump_json().encode() + b"\n")
