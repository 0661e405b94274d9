"""Read and write tokens files: trajectories as token ids, used by the teacher and the trainer.

Text is tokenized once. Teacher and trainer both read ids from this file, so they cannot disagree about the tokens of a
trajectory. The file is Parquet; its schema metadata hold the data's identity (docs/data.md).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hyperagent.errors import DataError
from hyperagent.identity import DataIdentity
from hyperagent.storage.files import new_file

TRAIN = "train"
VALIDATION = "validation"
HELD_OUT = "held_out"
HELD_OUT_TASKS = "held_out_tasks"

_FORMAT = b"hyperagent-tokens-2"
_IDS = pa.list_(pa.uint32())
_SCHEMA = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("repo", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("token_ids", _IDS, nullable=False),
        pa.field("positions", _IDS, nullable=False),
        pa.field("prompt_ids", _IDS, nullable=False),
        pa.field("student_ids", _IDS, nullable=True),
        pa.field("student_positions", _IDS, nullable=True),
    ]
)
_ROWS_PER_GROUP = 64
_GROUPS_KEPT = 2


@dataclass(frozen=True, eq=False)
class TokenizedTrajectory:
    """One trajectory: T tokens in the teacher's view, S in the student's view, N of them supervised in both."""

    trajectory_id: str
    repo: str
    split: str
    """`TRAIN`, `VALIDATION` or `HELD_OUT` (repositories in no other split), or `HELD_OUT_TASKS` (unseen tasks of
    training repositories)."""
    token_ids: NDArray[np.uint32]
    """Token ids of the teacher's view, shape [T]."""
    positions: NDArray[np.uint32]
    """Indices into `token_ids` of the supervised (assistant's) tokens, shape [N], strictly increasing, at least 1."""
    prompt_ids: NDArray[np.uint32]
    """Token ids of the condition, which the hypernetwork reads, shape [P]."""
    student_ids: NDArray[np.uint32]
    """Token ids of the student's view, shape [S]; the same object as `token_ids` if the student sees everything."""
    student_positions: NDArray[np.uint32]
    """Indices into `student_ids` of the supervised tokens, shape [N]."""

    def require_aligned(self) -> None:
        """Check that teacher and student view have the same sequence of supervised tokens.

        Raises:
            DataError: the sequences differ.
        """
        if self.student_ids is self.token_ids and self.student_positions is self.positions:
            return
        inside = len(self.student_positions) == len(self.positions) and (
            self.positions.max(initial=0) < len(self.token_ids)
            and self.student_positions.max(initial=0) < len(self.student_ids)
        )
        if not inside or not np.array_equal(self.student_ids[self.student_positions], self.token_ids[self.positions]):
            raise DataError("the supervised tokens of the teacher's and the student's view differ")


class TokensWriter:
    """Writes trajectories to a tokens file in row groups; created by `write_tokens`."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._pending: list[TokenizedTrajectory] = []

    def write(self, trajectory: TokenizedTrajectory) -> None:
        """Add one trajectory."""
        self._pending.append(trajectory)
        if len(self._pending) == _ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the trajectories added since the last row group."""
        if self._pending:
            rows = [_to_row(trajectory) for trajectory in self._pending]
            self._writer.write_table(pa.Table.from_pylist(rows, schema=self._writer.schema))
            self._pending.clear()


@contextmanager
def write_tokens(path: Path, identity: DataIdentity) -> Iterator[TokensWriter]:
    """Write a tokens file atomically; one row group is held in memory.

    Raises:
        StorageError: a file system operation failed; `path` is unchanged.
    """
    schema = _SCHEMA.with_metadata({b"format": _FORMAT, b"identity": identity.to_json()})
    with (
        new_file(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as parquet,
    ):
        writer = TokensWriter(parquet)
        yield writer
        writer.flush()


def read_data_identity(path: Path) -> DataIdentity:
    """Read the identity of a tokens file: its source data, tokenizer and settings.

    Raises:
        DataError: the file is missing or is not a tokens file.
    """
    return _open(path)[1]


def read_tokens(path: Path, *, split: str | None = None) -> Iterator[TokenizedTrajectory]:
    """Stream the trajectories of a tokens file in order, holding one batch in memory.

    Args:
        split: yield only trajectories of this split.

    Raises:
        DataError: the file is missing, is not a tokens file, is damaged, or its views are not aligned.
    """
    file, _ = _open(path)
    num_rows = 0
    try:
        for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP):
            num_rows += batch.num_rows
            for row in range(batch.num_rows):
                if split is None or batch.column("split")[row].as_py() == split:
                    trajectory = _from_row(batch, row)
                    trajectory.require_aligned()
                    yield trajectory
    except (pa.ArrowException, OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}; tokenize the data again") from error
    # A damaged page header can end a column early without an error.
    if num_rows != file.metadata.num_rows:
        raise DataError(
            f"{path} is damaged: {num_rows} of its {file.metadata.num_rows} rows are left; tokenize the data again"
        )


class TokensFile:
    """Random access to the trajectories of a tokens file; thread-safe.

    The most recently read row groups are kept in memory, since neighboring rows are usually read together.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            DataError: the file is missing or is not a tokens file.
        """
        self._path = path
        self._file, _ = _open(path)
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        self._ends = np.cumsum(sizes)
        self._lock = threading.Lock()
        self._groups: dict[int, pa.RecordBatch] = {}

    def row(self, row: int) -> TokenizedTrajectory:
        """Return the trajectory of one row.

        Raises:
            DataError: the file is damaged, or has no such row.
        """
        if not 0 <= row < self._file.metadata.num_rows:
            raise DataError(
                f"{self._path} has {self._file.metadata.num_rows} rows, so no row {row}; tokenize the data again"
            )
        group = int(np.searchsorted(self._ends, row, side="right"))
        try:
            with self._lock:
                batch = self._group(group)
            trajectory = _from_row(batch, row - int(self._ends[group]) + batch.num_rows)
            trajectory.require_aligned()
        except (pa.ArrowException, OSError, UnicodeDecodeError, DataError, IndexError) as error:
            raise DataError(
                f"{self._path} is damaged: {' '.join(str(error).split())}; tokenize the data again"
            ) from error
        return trajectory

    def _group(self, group: int) -> pa.RecordBatch:
        if group not in self._groups:
            while len(self._groups) >= _GROUPS_KEPT:
                del self._groups[next(iter(self._groups))]
            (self._groups[group],) = self._file.read_row_group(group).combine_chunks().to_batches()
        return self._groups[group]


def has_split(path: Path, split: str) -> bool:
    """Return whether a tokens file holds a trajectory of a split.

    Raises:
        DataError: as `read_tokens`.
    """
    return any(split in batch.column("split").to_pylist() for batch in _open(path)[0].iter_batches(columns=["split"]))


def count_tokens_rows(path: Path) -> int:
    """Return the number of trajectories in a tokens file."""
    return int(_open(path)[0].metadata.num_rows)


def _to_row(trajectory: TokenizedTrajectory) -> dict[str, object]:
    row: dict[str, object] = {name: getattr(trajectory, name) for name in _SCHEMA.names}
    if trajectory.student_ids is trajectory.token_ids:
        row["student_ids"] = row["student_positions"] = None
    return row


def _from_row(batch: pa.RecordBatch, row: int) -> TokenizedTrajectory:
    name, repo, split = (batch.column(column)[row].as_py() for column in ("trajectory_id", "repo", "split"))
    arrays = {column: _array(batch, column, row) for column in ("token_ids", "positions", "prompt_ids")}
    if batch.column("student_ids")[row].is_valid:
        arrays |= {column: _array(batch, column, row) for column in ("student_ids", "student_positions")}
    else:
        arrays |= {"student_ids": arrays["token_ids"], "student_positions": arrays["positions"]}
    return TokenizedTrajectory(name, repo, split, **arrays)


def _array(batch: pa.RecordBatch, name: str, row: int) -> NDArray[np.uint32]:
    # Copy, since a view would keep the whole batch in memory.
    array: NDArray[np.uint32] = batch.column(name)[row].values.to_numpy(zero_copy_only=False).astype(np.uint32)
    return array


def _open(path: Path) -> tuple[pq.ParquetFile, DataIdentity]:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True, buffer_size=1 << 20, pre_buffer=False)
    except FileNotFoundError:
        raise DataError(f"there is no tokens file {path}; make one with `hyperagent data tokenize`") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from error
    metadata = file.schema_arrow.metadata or {}
    if metadata.get(b"format") != _FORMAT or not file.schema_arrow.equals(_SCHEMA):
        raise DataError(
            f"{path} is not a tokens file ({_FORMAT.decode()}); make one from it with `hyperagent data tokenize`"
        )
    try:
        return file, DataIdentity.from_json(metadata[b"identity"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: its identity cannot be read; tokenize the data again") from error
