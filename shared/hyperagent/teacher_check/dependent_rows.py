"""Write and read the file of dependent rows, by which an evaluation splits a trajectory's rows.

Parquet, format `hyperagent-dependent-rows-1` (schema metadata `format`, `tokens`: the fingerprint of the tokens file,
`threshold`: in nats). One row per trajectory: `trajectory_id`, and `dependent`, a list with one Boolean per supervised
position.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hyperagent.data.files.checked_sample import origin
from hyperagent.errors import DataError
from hyperagent.identity import DataIdentity, require_same
from hyperagent.storage.files import new_file

_FORMAT = b"hyperagent-dependent-rows-1"
_SCHEMA = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("dependent", pa.list_(pa.bool_()), nullable=False),
    ]
)


def write_dependent_rows(
    path: Path, rows: Mapping[str, NDArray[np.bool_]], *, data: DataIdentity, threshold: float
) -> None:
    """Write which rows depend on the condition, atomically.

    Args:
        rows: for each trajectory id, whether each of its N rows is dependent, shape [N].
        data: identity of the tokens file whose rows these are, or of a sample of it.
        threshold: KL in nats above which a row is dependent.

    Raises:
        StorageError: a file system operation failed; `path` is unchanged.
    """
    metadata = {b"format": _FORMAT, b"tokens": origin(data).encode(), b"threshold": repr(threshold).encode()}
    columns = [pa.array(list(rows), pa.string()), pa.array([row.tolist() for row in rows.values()], _SCHEMA.types[1])]
    with new_file(path) as temporary:
        pq.write_table(
            pa.Table.from_arrays(columns, schema=_SCHEMA.with_metadata(metadata)),
            temporary,
            compression="zstd",
            write_page_checksum=True,
        )


def read_dependent_rows(path: Path, *, data: DataIdentity | None = None) -> dict[str, NDArray[np.bool_]]:
    """Read for each trajectory id whether each of its N rows depends on the condition, shape [N].

    Args:
        data: identity of the tokens file that the rows must belong to.

    Raises:
        DataError: the file is missing, is of another format, or is damaged.
        IdentityMismatch: it was made for another tokens file than that of `data`.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise DataError(
            f"there is no file {path}; make one with `hyperagent teacher-check compare --out {path}`"
        ) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}; run the teacher check again") from error
    metadata = table.schema.metadata or {}
    if metadata.get(b"format") != _FORMAT or not table.schema.equals(_SCHEMA):
        raise DataError(
            f"{path} does not hold dependent rows ({_FORMAT.decode()}); make a file of them with "
            "`hyperagent teacher-check compare --out`"
        )
    if data is not None:
        require_same(
            f"the tokens file of {path}",
            expected=origin(data),
            found=metadata[b"tokens"].decode(),
            remedy="run the teacher check on this tokens file",
        )
    names, rows = table["trajectory_id"].to_pylist(), table["dependent"].to_pylist()
    return {name: np.array(row, np.bool_) for name, row in zip(names, rows, strict=True)}
