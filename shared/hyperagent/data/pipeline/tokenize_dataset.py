"""Convert a data file to a tokens file: select rows, split them by repository, make their views, report refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hyperagent.config import StrictModel
from hyperagent.data.chat.messages import dialogue_of, refused_as
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.columns import Row
from hyperagent.data.files.reader import read_rows_or_refusals
from hyperagent.data.files.shards import fingerprint
from hyperagent.data.files.side_tables import read_joined, read_sources
from hyperagent.data.files.tokens_file import (
    HELD_OUT,
    HELD_OUT_TASKS,
    TRAIN,
    VALIDATION,
    TokenizedTrajectory,
    write_tokens,
)
from hyperagent.data.pipeline.parallel import map_rows
from hyperagent.data.pipeline.selection import NOT_SAMPLED, RowFacts, Selected, Selection, select_rows
from hyperagent.data.pipeline.split import SplitSettings, require_no_leaked_text, split_rows
from hyperagent.data.pipeline.views import ViewMaker, ViewSettings
from hyperagent.errors import DataError, RowRefused, TooLong
from hyperagent.identity import DataIdentity, file_fingerprint
from hyperagent.progress import Progress, no_progress


class TokenizeSettings(StrictModel):
    """Everything that determines a tokens file's contents, other than the data and the tokenizer."""

    views: ViewSettings = ViewSettings()
    selection: Selection = Selection()
    split: SplitSettings = SplitSettings()


@dataclass(frozen=True)
class JoinedFiles:
    """Files with additional columns about tasks, joined by instance id."""

    licenses: Path | None = None
    """File with the columns `instance_id` and `license_name`."""
    extra: Path | None = None
    """File with the columns `instance_id` and `text`, for the condition and the teacher."""


@dataclass(frozen=True)
class TokenizeReport:
    """Counts of the rows written, left out and refused."""

    rows: int
    """Number of rows in the file."""
    chosen: int
    """Number of rows selected for tokenization."""
    splits: Mapping[str, int]
    """Number of trajectories written, by split."""
    tokens: int
    supervised_tokens: int
    student_tokens: int
    prompt_tokens: int
    left_out: Mapping[str, int]
    """Number of usable rows that were not selected, by reason."""
    refused: tuple[RowRefused, ...]
    """Refusals of rows that cannot be used."""
    fingerprint: str
    """Fingerprint of the tokens file's identity."""

    @property
    def too_long(self) -> int:
        """Number of rows refused because they exceed the limit of tokens."""
        return sum(refusal.kind is TooLong for refusal in self.refused)


def tokenize_file(
    source: Path,
    target: Path,
    tokenizer: ChatTokenizer,
    settings: TokenizeSettings,
    *,
    joined: JoinedFiles = JoinedFiles(),
    strict: bool = False,
    num_workers: int | None = None,
    reading: Progress = no_progress,
    tokenizing: Progress = no_progress,
) -> TokenizeReport:
    """Tokenize `source` (trajectories) into `target` (a tokens file) atomically.

    A row that cannot be used is left out and listed in the report.

    Args:
        strict: raise at the first row that cannot be used.
        num_workers: number of processes (see `parallel.map_rows`).
        reading: called with (rows read, rows of the file).
        tokenizing: called with (rows done, rows selected).

    Raises:
        DataError: a file is unusable, an extra text shows a trajectory that must stay unseen, or no row is left of a
            split that training needs.
        ConfigError: the chat template cannot be used.
        RowRefused: in strict mode.
        StorageError: a file system operation failed.
    """
    maker = ViewMaker(tokenizer)
    extra_of = read_extra_texts(joined.extra, settings.views)
    identity = _identity(source, tokenizer, settings, joined)
    license_of = read_joined(joined.licenses, "license_name") if joined.licenses else None
    texts = extra_of if joined.extra else None
    selected = select_rows(source, settings.selection, license_of, texts, strict=strict, progress=reading)
    splits = split_rows(selected.rows, settings.split)
    if joined.extra:
        require_no_leaked_text(selected.rows, splits, read_sources(joined.extra))

    counts: Counter[str] = Counter()
    refused = list(selected.refused)
    tasks = _tasks(source, selected.rows, splits, extra_of)
    results = map_rows(
        RowTokenizer(maker, settings.views), tasks, num_items=len(selected.rows), num_workers=num_workers
    )
    with write_tokens(target, identity) as writer:
        for done, result in enumerate(results, start=1):
            tokenizing(done, len(selected.rows))
            if isinstance(result, RowRefused):
                if strict:
                    raise result
                refused.append(result)
                continue
            writer.write(result)
            counts.update(_counts(result))
        _require_splits(source, counts, selected, refused, _needed_splits(settings.split))
    return TokenizeReport(
        rows=selected.num_rows,
        chosen=len(selected.rows) + len(selected.refused),
        splits={split: counts[split] for split in (TRAIN, VALIDATION, HELD_OUT, HELD_OUT_TASKS)},
        tokens=counts["tokens"],
        supervised_tokens=counts["supervised_tokens"],
        student_tokens=counts["student_tokens"],
        prompt_tokens=counts["prompt_tokens"],
        left_out=selected.left_out,
        refused=tuple(refused),
        fingerprint=identity.fingerprint,
    )


def read_extra_texts(path: Path | None, views: ViewSettings) -> dict[str, str]:
    """Return the extra texts by instance id, none without a file.

    Raises:
        DataError: the file is unusable, or there is one although the condition does not contain it, or the reverse.
    """
    if bool(path) != ("extra" in views.condition):
        raise DataError(
            "the condition contains extra text if and only if a file with extra texts is given; set both or neither"
        )
    return read_joined(path, "text") if path else {}


@dataclass(frozen=True, eq=False)
class MeasuredRows:
    """Lengths of a sample of n rows of a file; a row that cannot be used has length 0 in every array."""

    num_wanted: int
    """Number of rows that the sample represents."""
    tokens: NDArray[np.int64]
    """Number of tokens of each row in the teacher's view, shape [n]."""
    supervised: NDArray[np.int64]
    """Number of supervised tokens of each row, shape [n]."""
    student_tokens: NDArray[np.int64]
    """Number of tokens of each row in the student's view, shape [n]."""


def measure_rows(
    source: Path,
    tokenizer: ChatTokenizer,
    views: ViewSettings,
    selection: Selection,
    *,
    num_workers: int | None = None,
    reading: Progress = no_progress,
    tokenizing: Progress = no_progress,
) -> MeasuredRows:
    """Tokenize the rows chosen by `selection` and return only their lengths; arguments as in `tokenize_file`.

    Raises:
        DataError: the file is unusable.
        ConfigError: the chat template cannot be used.
    """
    function = RowTokenizer(ViewMaker(tokenizer), views)
    selected = select_rows(source, selection, progress=reading)
    tasks = _tasks(source, selected.rows, dict.fromkeys((row.number for row in selected.rows), TRAIN), {})
    lengths = np.zeros((len(selected.rows), 3), dtype=np.int64)
    results = map_rows(function, tasks, num_items=len(selected.rows), num_workers=num_workers)
    for number, result in enumerate(results):
        tokenizing(number + 1, len(selected.rows))
        if isinstance(result, TokenizedTrajectory):
            lengths[number] = len(result.token_ids), len(result.positions), len(result.student_ids)
    wanted = len(selected.rows) + selected.left_out.get(NOT_SAMPLED, 0)
    return MeasuredRows(wanted, *lengths.T)


class RowTask(NamedTuple):
    """One row with its name, split and extra text."""

    row: Row
    name: str
    split: str
    extra: str | None


class RowTokenizer:
    """Makes a row's views, or returns the refusal of a row that cannot be used."""

    def __init__(self, maker: ViewMaker, settings: ViewSettings) -> None:
        self._maker = maker
        self._settings = settings

    def __call__(self, task: RowTask) -> TokenizedTrajectory | RowRefused:
        try:
            with refused_as(task.name):
                dialogue = dialogue_of(task.row)
                return self._maker.make(
                    task.name, task.row["repo"], task.split, dialogue, settings=self._settings, extra=task.extra
                )
        except RowRefused as refusal:
            return refusal


def _tasks(
    source: Path, rows: tuple[RowFacts, ...], splits: Mapping[int, str], extra_of: Mapping[str, str]
) -> Iterator[RowTask]:
    chosen = {fact.number: fact for fact in rows}
    for number, row in enumerate(read_rows_or_refusals(source)):
        if (fact := chosen.get(number)) is not None:
            assert not isinstance(row, RowRefused)
            yield RowTask(row, fact.name, splits[number], extra_of.get(fact.instance_id))


def _counts(trajectory: TokenizedTrajectory) -> dict[str, int]:
    return {
        trajectory.split: 1,
        "tokens": len(trajectory.token_ids),
        "supervised_tokens": len(trajectory.positions),
        "student_tokens": len(trajectory.student_ids),
        "prompt_tokens": len(trajectory.prompt_ids),
    }


def _needed_splits(settings: SplitSettings) -> tuple[str, ...]:
    return (TRAIN, VALIDATION, HELD_OUT) if settings.validation_share else (TRAIN, HELD_OUT)


def _require_splits(
    source: Path, counts: Counter[str], selected: Selected, refused: list[RowRefused], needed: tuple[str, ...]
) -> None:
    for split in needed:
        if counts[split] == 0:
            why = f"; the first refusal: {refused[0]}" if refused else ""
            raise DataError(
                f"no usable trajectory of {source} is left in the {split} split ({len(refused)} of "
                f"{selected.num_rows} refused, {sum(selected.left_out.values())} left out){why}"
            )


def _identity(source: Path, tokenizer: ChatTokenizer, settings: TokenizeSettings, joined: JoinedFiles) -> DataIdentity:
    chosen: dict[str, Any] = settings.model_dump(mode="json")
    # The fingerprint keeps the original field names: other names would invalidate every existing cache.
    chosen["views"]["internalised"] = chosen["views"].pop("internalized")
    chosen["selection"]["licences"] = chosen["selection"].pop("licenses")
    # For the same reason, settings that are newer than the format are recorded only where they have an effect.
    if "extra" not in settings.views.condition or settings.views.extra_in_teacher is None:
        del chosen["views"]["extra_in_teacher"]
    if not settings.split.validation_share:
        del chosen["split"]["validation_share"]
    for name, path in (("licences_file", joined.licenses), ("extra_file", joined.extra)):
        if path is not None:
            chosen[name] = file_fingerprint(path)
    return DataIdentity(tokenizer.identity, fingerprint(source), chosen)
