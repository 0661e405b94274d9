"""State of a run that has no process: read it, and write it in the process's place."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from hyperagent.errors import HyperagentError
from hyperagent.http.run_models import FINAL_STATES, RunState
from hyperagent_trainer.runs.folder import RunFolder

_LOG_TAIL_BYTES = 4096
_LOG_LINE_CHARACTERS = 300


def is_final(folder: RunFolder) -> bool:
    """Return whether the run's status is final; an unreadable one is not."""
    with suppress(HyperagentError):
        return folder.read_status().state in FINAL_STATES
    return False


def has_started(folder: RunFolder) -> bool:
    """Return whether the training process has begun to handle SIGTERM; torchrun's exit code does not reveal it."""
    return folder.read_status().state not in ("queued", "loading")


def settle(folder: RunFolder, *, state: RunState, reason: str) -> None:
    """Write a final state for a run that has no process, unless its process wrote one."""
    status = folder.read_status()
    if status.state not in FINAL_STATES:
        write_state(folder, state, f"{reason}; last line of {folder.log}: {_last_line(folder.log)}")


def write_state(folder: RunFolder, state: RunState, reason: str) -> None:
    """Write the state of a run that has no process."""
    changes = {"state": state, "reason": reason, "eta_s": None, "updated_at": time.time()}
    folder.write_status(folder.read_status().model_copy(update=changes))


def _last_line(path: Path) -> str:
    """Return the last non-empty line of a log, truncated to a readable length."""
    if not path.exists():
        return "(no log)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line[:_LOG_LINE_CHARACTERS] for line in reversed(lines) if line), "(empty)")
