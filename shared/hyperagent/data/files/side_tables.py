"""Read additional tables about tasks (licenses, extra texts), joined by instance id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hyperagent.data.files.shards import JSON_LINES
from hyperagent.errors import DataError


def read_joined(path: Path, column: str) -> dict[str, str]:
    """Read a mapping of `instance_id` to `column` from Parquet or JSON Lines, such as the rows of nebius/SWE-rebench.

    Raises:
        DataError: the file is missing or damaged, lacks a column, holds a value that is not text, or holds two
            different values for one instance.
    """
    pairs = _json_lines(path, column) if path.suffix == JSON_LINES else _parquet(path, column)
    found: dict[str, str] = {}
    for instance_id, value in pairs:
        if not isinstance(instance_id, str) or not isinstance(value, str):
            raise DataError(f"{path} has the instance {instance_id!r} with {column} {value!r}; both must be text")
        if found.setdefault(instance_id, value) != value:
            raise DataError(f"{path} has two different values of {column} for {instance_id}; keep one")
    return found


def read_sources(path: Path) -> dict[str, tuple[str, ...]]:
    """Read of a file with extra texts, by instance id, the ids of the instances whose trajectories a text holds.

    They stand in the column `sources` of JSON Lines, as `hyperagent data extra` writes it. A text without it, and one
    in Parquet, holds none.

    Raises:
        DataError: the file is missing or damaged, or sources are not a list of texts.
    """
    found: dict[str, tuple[str, ...]] = {}
    for row in _json_rows(path) if path.suffix == JSON_LINES else []:
        sources = row.get("sources", []) if isinstance(row, dict) else []
        if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
            raise DataError(f"{path} has the sources {sources!r}; they must be a list of instance ids")
        if sources:
            found[row["instance_id"]] = tuple(sources)
    return found


def _parquet(path: Path, column: str) -> list[tuple[object, object]]:
    try:
        table = pq.read_table(path, columns=["instance_id", column])
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise DataError(
            f"{path} is not a Parquet file with instance_id and {column}: {' '.join(str(error).split())}; "
            f"JSON Lines must be named *{JSON_LINES}"
        ) from error
    if set(table.column_names) != {"instance_id", column}:
        raise DataError(f"{path} needs the columns instance_id and {column}")
    return list(zip(table["instance_id"].to_pylist(), table[column].to_pylist(), strict=True))


def _json_lines(path: Path, column: str) -> list[tuple[object, object]]:
    try:
        return [(row["instance_id"], row[column]) for row in _json_rows(path)]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} must hold a JSON object with instance_id and {column} in every line: {type(error).__name__} {error}"
        ) from error


def _json_rows(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must hold a JSON object in every line: {type(error).__name__} {error}") from error
