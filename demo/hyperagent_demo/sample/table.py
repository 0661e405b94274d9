"""Write the rows of a sample as Parquet in the real data set's schema."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hyperagent.data.files.schema import TRAJECTORY_SCHEMA
from hyperagent.storage.files import write_atomically


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows atomically.

    Raises:
        StorageError: a file system operation failed.
    """
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAJECTORY_SCHEMA), buffer, compression="zstd")
    write_atomically(path, buffer.getvalue())
