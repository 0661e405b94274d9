"""Runs folder: create, list and read runs, each in its own folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hyperagent.config import StrictModel
from hyperagent.errors import ConfigError, CorruptRecord, NotFound, ServiceError
from hyperagent.http.run_models import ComparisonRequest, RunRequest, RunStatus
from hyperagent.storage.file_lock import open_locked
from hyperagent.storage.files import new_directory
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.metrics_file import START, MetricLines, Place, read_lines

MAX_METRIC_LINES = 10_000
"""Maximum number of lines per request."""

_RUN_ID = re.compile(r"\d{8}-\d{6}-\d{6}")


class _RunRecord(StrictModel):
    """Contents of request.json."""

    request: RunRequest | ComparisonRequest
    idempotency_key: str | None


@dataclass(frozen=True)
class Run:
    """One run in its current state."""

    run_id: str
    """Time of the first start in UTC with microseconds, so that ids sort by age."""
    request: RunRequest | ComparisonRequest
    idempotency_key: str | None
    status: RunStatus
    folder: RunFolder

    @property
    def is_resumable(self) -> bool:
        """Whether the run has a checkpoint to continue from and no process."""
        return self.status.state in ("stopped", "failed") and bool(self.folder.saved_steps())


def new_run_id() -> str:
    """Return the id of a run that starts now."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"


class Runs:
    """Runs in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, run_id: str, request: RunRequest, recipe: TrainRecipe, *, idempotency_key: str | None) -> Run:
        """Create the folder of a new run atomically.

        Raises:
            StorageError: a file operation failed.
        """
        record = _RunRecord(request=request, idempotency_key=idempotency_key)
        with new_directory(self.root / run_id) as root:
            folder = RunFolder(root)
            folder.request.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
            folder.recipe.write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
            folder.write_status(RunStatus(state="queued", num_steps=recipe.num_steps))
        return self.get(run_id)

    def create_comparison(self, run_id: str, request: ComparisonRequest, *, idempotency_key: str | None) -> Run:
        """Create the folder of a new run that compares others, atomically.

        Raises:
            StorageError: a file operation failed.
        """
        record = _RunRecord(request=request, idempotency_key=idempotency_key)
        with new_directory(self.root / run_id) as root:
            folder = RunFolder(root)
            folder.request.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
            folder.write_status(RunStatus(state="queued", num_steps=1))
        return self.get(run_id)

    def all(self) -> list[Run]:
        """Return all runs, newest first.

        Raises:
            CorruptRecord: the files of a run cannot be read.
        """
        ids = sorted((path.name for path in self.root.iterdir() if _RUN_ID.fullmatch(path.name)), reverse=True)
        return [self.get(run_id) for run_id in ids]

    def get(self, run_id: str) -> Run:
        """Return one run.

        Raises:
            NotFound: there is no such run.
            CorruptRecord: its files cannot be read.
        """
        folder = self.folder(run_id)
        try:
            record = _RunRecord.model_validate_json(folder.request.read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptRecord(
                f"{folder.request} is damaged; move {folder.root} elsewhere to continue without this run"
            ) from error
        return Run(run_id, record.request, record.idempotency_key, folder.read_status(), folder)

    def metrics(self, run_id: str, *, since: Place = START, limit: int = MAX_METRIC_LINES) -> MetricLines:
        """Return at most `limit` lines of a run's metrics from `since` on.

        Raises:
            NotFound: there is no such run.
            CorruptRecord: a line is not JSON.
        """
        return read_lines(self.folder(run_id).metrics, since, limit=limit)

    def folder(self, run_id: str) -> RunFolder:
        """Return the folder of one run.

        Raises:
            NotFound: there is no such run.
        """
        # The pattern rejects paths such as "../..".
        folder = RunFolder(self.root / run_id)
        if not _RUN_ID.fullmatch(run_id) or not folder.root.is_dir():
            raise NotFound(f"there is no run {run_id!r}; GET /v1/runs lists all runs")
        return folder


def lock_runs(runs: Path) -> int:
    """Lock the runs folder until the returned descriptor is closed; child processes do not inherit it.

    Raises:
        ServiceError: another control process holds the lock.
        ConfigError: the folder cannot be created or locked.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        return open_locked(runs, exclusive=True)
    except BlockingIOError:
        raise ServiceError(f"another control process uses {runs}; stop it, or choose another runs folder") from None
    except OSError as error:
        raise ConfigError(f"cannot use {runs} as the runs folder: {error}; choose another") from error
