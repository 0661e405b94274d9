"""Reading trajectories from Parquet in the schema of nebius/SWE-rebench-openhands-trajectories.

Row groups stream, so memory is bounded by the largest group, not by the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hyperagent.errors import DataError

Row = Mapping[str, Any]

_COLUMNS = {
    "trajectory_id": "string",
    "repo": "string",
    "trajectory": "list of structs with content, role, tool_calls, ...",
    "tools": "list of structs with function and type",
}
_MESSAGE_FIELDS = {"content", "role", "tool_calls"}


def count_rows(path: Path) -> int:
    """Number of trajectories in a file.

    Raises:
        DataError: as `read_rows`.
    """
    return int(_open(path).metadata.num_rows)


def read_rows(path: Path) -> Iterator[Row]:
    """Stream the rows of a file, in order, with the columns this project uses.

    Raises:
        DataError: the file is missing, is not Parquet, is damaged, or lacks a column; every missing column is named.
    """
    file = _open(path)
    try:
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(batch_size=16, row_groups=[group], columns=list(_COLUMNS)):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}; copy it again") from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from error
    _check_schema(path, file.schema_arrow)
    return file


def _check_schema(path: Path, schema: pa.Schema) -> None:
    wrong = [f"{name} ({kind}) is missing" for name, kind in _COLUMNS.items() if name not in schema.names]
    for name in ("trajectory_id", "repo"):
        if name in schema.names and not _is_string(schema.field(name).type):
            wrong.append(f"{name} is {schema.field(name).type}, not string")
    for name in ("trajectory", "tools"):
        kind = schema.field(name).type if name in schema.names else pa.null()
        element = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if pa.types.is_null(element):
            # A column of nothing has no type; what a row lacks is said of the row.
            continue
        if element is kind or not pa.types.is_struct(element):
            wrong.append(f"{name} is {kind}, not a list of structs")
        elif name == "trajectory":
            wrong.extend(_wrong_in_messages({field.name: field.type for field in element}))
    if wrong:
        raise DataError(
            f"{path} is not in the schema of nebius/SWE-rebench-openhands-trajectories: {'; '.join(wrong)}; its columns are {', '.join(schema.names)}"
        )


def _wrong_in_messages(types: Mapping[str, pa.DataType]) -> list[str]:
    wrong = []
    if missing := _MESSAGE_FIELDS - types.keys():
        wrong.append(f"trajectory's messages lack {', '.join(sorted(missing))}")
    for name in ("content", "role"):
        if name in types and not _is_string(types[name]):
            wrong.append(f"{name} of trajectory's messages is {types[name]}, not string")
    return wrong


def _is_string(kind: pa.DataType) -> bool:
    # Some writers give every string 64-bit offsets.
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
