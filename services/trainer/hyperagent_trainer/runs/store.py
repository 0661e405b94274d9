"""The runs folder: a folder per run, and what of them can be listed and read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hyperagent.config import StrictModel
from hyperagent.errors import CorruptRecord, NotFound
from hyperagent.http.run_models import RunRequest, RunStatus
from hyperagent.storage.files import new_directory
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.metrics_file import START, MetricLines, Place, read_lines

MAX_METRIC_LINES = 10_000
"""Most lines a caller gets at once."""

_RUN_ID = re.compile(r"\d{8}-\d{6}-\d{6}")


class _RunRecord(StrictModel):
    """What request.json holds."""

    request: RunRequest
    idempotency_key: str | None


@dataclass(frozen=True)
class Run:
    """One run in its present state."""

    run_id: str
    """When it was first started, UTC, to the microsecond; so ids sort by age."""
    request: RunRequest
    idempotency_key: str | None
    status: RunStatus
    folder: RunFolder

    @property
    def is_resumable(self) -> bool:
        """Whether there is something to go on from and no process that does."""
        return self.status.state in ("stopped", "failed") and bool(self.folder.saved_steps())


def new_run_id() -> str:
    """The id of a run that begins now."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"


class Runs:
    """The runs under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, run_id: str, request: RunRequest, recipe: TrainRecipe, *, idempotency_key: str | None) -> Run:
        """Make the folder of a new run, whole or not at all.

        Raises:
            StorageError: the file system refused.
        """
        record = _RunRecord(request=request, idempotency_key=idempotency_key)
        with new_directory(self.root / run_id) as root:
            folder = RunFolder(root)
            folder.request.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
            folder.recipe.write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
            folder.write_status(RunStatus(state="queued", num_steps=recipe.num_steps))
        return self.get(run_id)

    def all(self) -> list[Run]:
        """Every run, the newest first.

        Raises:
            CorruptRecord: the files of one cannot be read.
        """
        ids = sorted((path.name for path in self.root.iterdir() if _RUN_ID.fullmatch(path.name)), reverse=True)
        return [self.get(run_id) for run_id in ids]

    def get(self, run_id: str) -> Run:
        """One run.

        Raises:
            NotFound: there is no such run.
            CorruptRecord: its files cannot be read.
        """
        folder = self.folder(run_id)
        try:
            record = _RunRecord.model_validate_json(folder.request.read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptRecord(
                f"{folder.request} is damaged; move {folder.root} elsewhere to go on without this run"
            ) from error
        return Run(run_id, record.request, record.idempotency_key, folder.read_status(), folder)

    def metrics(self, run_id: str, *, since: Place = START, limit: int = MAX_METRIC_LINES) -> MetricLines:
        """The run's metrics from `since` on, at most `limit` lines.

        Raises:
            NotFound: there is no such run.
            CorruptRecord: a line is not JSON.
        """
        return read_lines(self.folder(run_id).metrics, since, limit=limit)

    def folder(self, run_id: str) -> RunFolder:
        """One run's files.

        Raises:
            NotFound: there is no such run.
        """
        # The pattern keeps a caller's "../.." out of the path.
        folder = RunFolder(self.root / run_id)
        if not _RUN_ID.fullmatch(run_id) or not folder.root.is_dir():
            raise NotFound(f"there is no run {run_id!r}; GET /v1/runs lists those there are")
        return folder
