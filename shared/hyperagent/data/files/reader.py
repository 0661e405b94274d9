"""Read trajectories from Parquet or JSON Lines in the schema of `hyperagent.data.files.schema`.

Rows stream through a small buffer, so memory is bounded by a few rows, independent of the file and its row groups.
Columns are checked here, values where they are used: an invalid value invalidates its row, not the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hyperagent.data.files.schema import DATASET, NEEDED_COLUMNS, TRAJECTORY_SCHEMA, schema_differences
from hyperagent.errors import DataError, RowRefused

Row = Mapping[str, Any]

JSON_LINES = ".jsonl"

_ROWS_PER_BATCH = 16
_BUFFER_BYTES = 1 << 20
# A row of 131,072 tokens has about half a megabyte; a longer line than this is never read into memory as a whole.
_MAX_LINE_BYTES = 64 << 20


def count_rows(path: Path) -> int:
    """Return the number of trajectories in a file; in JSON Lines these are the lines that are not blank.

    Raises:
        DataError: as `read_rows`.
    """
    if path.suffix == JSON_LINES:
        return sum(1 for _ in _lines(path))
    return int(_open(path).metadata.num_rows)


def read_rows(path: Path) -> Iterator[Row]:
    """Stream the rows of a file in order; a row has every column of the schema, None where the file lacks it.

    Raises:
        DataError: the file is missing, is of another format, is damaged, or lacks a required column.
        RowRefused: a line of a JSON Lines file is not a row.
    """
    for row in read_rows_or_refusals(path):
        if isinstance(row, RowRefused):
            raise row
        yield row


def read_rows_or_refusals(path: Path) -> Iterator[Row | RowRefused]:
    """Stream rows like `read_rows`, but yield a refusal in place of a line that is not a row.

    Raises:
        DataError: as `read_rows`.
    """
    yield from _read_json_lines(path) if path.suffix == JSON_LINES else _read_parquet(path)


def read_schema_differences(path: Path) -> list[str]:
    """Return a Parquet file's differences from the schema; none for JSON Lines, whose rows are checked one by one.

    Raises:
        DataError: as `read_rows`.
    """
    return [] if path.suffix == JSON_LINES else schema_differences(_open(path).schema_arrow)


def _read_parquet(path: Path) -> Iterator[Row]:
    file = _open(path)
    columns = [name for name in TRAJECTORY_SCHEMA.names if name in file.schema_arrow.names]
    absent = dict.fromkeys(set(TRAJECTORY_SCHEMA.names) - set(columns))
    try:
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=columns):
            for row in batch.to_pylist():
                yield {**row, **absent}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}; copy it again") from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        # pre_buffer would read whole column chunks and keep those of all row groups until the last one is read.
        file = pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a Parquet file: {' '.join(str(error).split())}; JSON Lines must be named *{JSON_LINES}"
        ) from error
    if not set(NEEDED_COLUMNS) <= set(file.schema_arrow.names):
        raise DataError(
            f"{path} is not in the schema of {DATASET}: {'; '.join(schema_differences(file.schema_arrow))}; "
            "give a file with these columns"
        )
    return file


def _read_json_lines(path: Path) -> Iterator[Row | RowRefused]:
    for number, line in enumerate(_lines(path)):
        if len(line) > _MAX_LINE_BYTES:
            yield RowRefused(f"row {number}", f"its line is longer than {_MAX_LINE_BYTES:,} bytes")
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield RowRefused(f"row {number}", f"its line is not JSON: {' '.join(str(error).split())}")
            continue
        if isinstance(row, dict):
            yield {name: row.get(name) for name in TRAJECTORY_SCHEMA.names}
        else:
            yield RowRefused(f"row {number}", f"its line is a JSON {type(row).__name__}, not an object")


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines that are not blank; a line that is too long is truncated to one byte more than the limit."""
    try:
        with path.open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES + 1):
                if line.strip():
                    yield line
                while len(line) > _MAX_LINE_BYTES and not line.endswith(b"\n"):
                    line = file.readline(_MAX_LINE_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
