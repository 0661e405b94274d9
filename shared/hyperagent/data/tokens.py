"""Trajectories as token ids: the file that travels from tokenisation to the teacher and the trainer.

Text is tokenised once. From here on everybody reads ids from this file, so teacher and student cannot
disagree about what a trajectory is. The file is Parquet; its schema metadata carry the tokenizer's identity.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hyperagent.errors import DataError
from hyperagent.files import write_atomically
from hyperagent.identity import TokenizerIdentity

TRAIN = "train"
HELD_OUT = "held_out"

_FORMAT = b"hyperagent-tokens-1"
_SCHEMA = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("repo", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.uint32()), nullable=False),
        pa.field("positions", pa.list_(pa.uint32()), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.uint32()), nullable=False),
    ]
)

_ARRAYS = ("token_ids", "positions", "prompt_ids")


@dataclass(frozen=True, eq=False)
class TokenisedTrajectory:
    """One trajectory, T tokens of which N are supervised."""

    trajectory_id: str
    repo: str
    split: str
    """`TRAIN` or `HELD_OUT`; a repo is never in both."""
    token_ids: NDArray[np.uint32]
    """[T]."""
    positions: NDArray[np.uint32]
    """[N], strictly increasing, each at least 1: the supervised tokens, which the assistant wrote."""
    prompt_ids: NDArray[np.uint32]
    """[P]: the condition view, what the hypernetwork reads."""


def write_tokens(path: Path, trajectories: Sequence[TokenisedTrajectory], tokenizer: TokenizerIdentity) -> None:
    """Write a tokens file, whole or not at all.

    Raises:
        StorageError: the file system refused.
    """
    metadata = {b"format": _FORMAT, b"tokenizer": json.dumps(asdict(tokenizer)).encode()}
    table = pa.Table.from_pylist([asdict(t) for t in trajectories], schema=_SCHEMA.with_metadata(metadata))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    write_atomically(path, buffer.getvalue())


def read_tokenizer_identity(path: Path) -> TokenizerIdentity:
    """What the file was tokenised with.

    Raises:
        DataError: the file is missing or is not a tokens file.
    """
    return _open(path)[1]


def read_tokens(path: Path, *, split: str | None = None) -> Iterator[TokenisedTrajectory]:
    """Stream the trajectories of a tokens file, in the file's order, one row group in memory at a time.

    Raises:
        DataError: the file is missing, is not a tokens file, or is damaged.
    """
    file, _ = _open(path)
    num_rows = 0
    try:
        for batch in file.iter_batches(batch_size=64):
            num_rows += batch.num_rows
            for row in batch.to_pylist():
                if split is None or row["split"] == split:
                    arrays = {name: np.asarray(row[name], dtype=np.uint32) for name in _ARRAYS}
                    yield TokenisedTrajectory(**{**row, **arrays})
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}; tokenise the data again") from error
    # A damaged page header can end a column early without any error.
    if num_rows != file.metadata.num_rows:
        raise DataError(
            f"{path} is damaged: {num_rows} of its {file.metadata.num_rows} rows are left; tokenise the data again"
        )


def count_tokens_rows(path: Path) -> int:
    """Number of trajectories in a tokens file."""
    return int(_open(path)[0].metadata.num_rows)


def _open(path: Path) -> tuple[pq.ParquetFile, TokenizerIdentity]:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
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
        return file, TokenizerIdentity(**json.loads(metadata[b"tokenizer"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: its tokenizer is not readable; tokenise the data again") from error
