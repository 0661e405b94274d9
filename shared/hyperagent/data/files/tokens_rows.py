"""Names of the trajectories of a tokens file, read without their token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hyperagent.data.files.tokens_file import read_data_identity
from hyperagent.errors import DataError

_COLUMNS = ["trajectory_id", "repo", "split"]


@dataclass(frozen=True)
class TokensRow:
    """One row of a tokens file."""

    number: int
    """Row number, from 0, for `TokensFile.row`."""
    trajectory_id: str
    repo: str
    split: str


def read_tokens_rows(path: Path) -> list[TokensRow]:
    """Read the names of all trajectories of a tokens file, in order.

    Raises:
        DataError: the file is missing, is not a tokens file, or is damaged.
    """
    read_data_identity(path)
    try:
        table = pq.read_table(path, columns=_COLUMNS, page_checksum_verification=True)
        columns = [table[name].to_pylist() for name in _COLUMNS]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}; tokenize the data again") from error
    return [TokensRow(number, *names) for number, names in enumerate(zip(*columns, strict=True))]
