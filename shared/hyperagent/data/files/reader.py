"""Read trajectories from Parquet or JSON Lines, in the schema of `hyperagent.data.files.schema` or under other names.

Rows stream through a small buffer, so memory is bounded by a few rows, independent of the file and its row groups.
Columns are checked here, values where they are used: an invalid value invalidates its row, not the file. Only the columns
that are used are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from hyperagent.data.files.columns import Columns, Row, read_columns, row_of
from hyperagent.data.files.schema import schema_differences
from hyperagent.data.files.shards import MAX_LINE_BYTES, is_json_lines, lines, open_parquet, shards
from hyperagent.errors import DataError, RowRefused

_ROWS_PER_BATCH = 16


def count_rows(path: Path) -> int:
    """Return the number of trajectories in a file or folder; in JSON Lines these are the lines that are not blank.

    Raises:
        DataError: as `read_rows`.
    """
    return sum(
        sum(1 for _ in lines(file)) if is_json_lines(file) else int(open_parquet(file).metadata.num_rows)
        for file in shards(path)
    )


def read_rows(path: Path) -> Iterator[Row]:
    """Stream the rows of a file or folder in order; a row has every column of `columns.row_of`.

    Raises:
        DataError: a file is missing, is of another format, is damaged, or has no column with messages.
        ConfigError: the file that names the columns cannot be read.
        RowRefused: a line of a JSON Lines file is not a row.
    """
    for row in read_rows_or_refusals(path):
        if isinstance(row, RowRefused):
            raise row
        yield row


def read_rows_or_refusals(path: Path) -> Iterator[Row | RowRefused]:
    """Stream rows like `read_rows`, but yield a refusal in place of a line that is not a row.

    Raises:
        DataError, ConfigError: as `read_rows`.
    """
    columns = read_columns(path)
    first = 0
    for file in shards(path):
        rows = _read_json_lines(file, columns, first) if is_json_lines(file) else _read_parquet(file, columns)
        for row in rows:
            first += 1
            yield row


def read_schema_differences(path: Path) -> list[str]:
    """Return the differences of Parquet from the schema; none for JSON Lines, whose rows are checked one by one.

    Raises:
        DataError: as `read_rows`.
    """
    files = [file for file in shards(path) if not is_json_lines(file)]
    return list(dict.fromkeys(line for file in files for line in schema_differences(open_parquet(file).schema_arrow)))


def _read_parquet(path: Path, columns: Columns) -> Iterator[Row]:
    file = open_parquet(path)
    sources = columns.sources(file.schema_arrow.names, path)
    try:
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=list(sources.values())):
            for row in batch.to_pylist():
                yield row_of(row, sources)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}; copy it again") from error


def _read_json_lines(path: Path, columns: Columns, first: int) -> Iterator[Row | RowRefused]:
    for number, line in enumerate(lines(path), start=first):
        if len(line) > MAX_LINE_BYTES:
            yield RowRefused(f"row {number}", f"its line is longer than {MAX_LINE_BYTES:,} bytes")
            continue
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield RowRefused(f"row {number}", f"its line is not JSON: {' '.join(str(error).split())}")
            continue
        if not isinstance(raw, dict):
            yield RowRefused(f"row {number}", f"its line is a JSON {type(raw).__name__}, not an object")
            continue
        yield _json_row(raw, columns, path, number)


def _json_row(raw: Mapping[str, Any], columns: Columns, path: Path, number: int) -> Row | RowRefused:
    try:
        return row_of(raw, columns.sources(raw, path))
    except DataError as error:  # The rows of a file may have different keys.
        return RowRefused(f"row {number}", str(error))
