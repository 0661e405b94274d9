"""Read the teacher's rows of a trajectory, or of a range of its tokens, from the cache into tensors.

The rows of all blocks are written into one set of tensors.

Legend of shape suffixes: N rows, K maximum number of ids that a row keeps, M temperatures other than 1.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from hyperagent.cache.base import CacheReader
from hyperagent.cache.format.convert import padded_rows
from hyperagent.cache.format.record import StoredRows
from hyperagent.errors import InvalidRequest
from hyperagent_trainer.data.teacher_rows import TeacherRows

# Torch warns, once per process, about a tensor that shares memory with a read-only array. The tensors here are only copied
# from.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))


def load_rows(cache: CacheReader, key: str, *, first_token: int = 0, end_token: int | None = None) -> TeacherRows:
    """Read a trajectory's rows as they are stored: at temperature 1, normalized but for rounding, without target ids.

    Args:
        first_token, end_token: read the rows at positions in [first_token, end_token); by default all rows.

    Raises:
        NotFound: the cache has no such trajectory.
        CorruptRecord: a record is damaged; the message names it and how to repair it.
        InvalidRequest: the range is not within the trajectory.
        StorageError: the file system reported an error.
    """
    trajectory = cache.trajectory(key)
    end = trajectory.num_tokens if end_token is None else end_token
    if not 0 <= first_token <= end <= trajectory.num_tokens:
        raise InvalidRequest(
            f"tokens {first_token} to {end} are not a range of a trajectory of {trajectory.num_tokens} tokens"
        )
    size = cache.settings.block_tokens
    blocks = [b for b in trajectory.blocks if b.index * size < end and (b.index + 1) * size > first_token]
    num_rows, top_k = sum(block.num_rows for block in blocks), cache.identity.top_k
    temperatures = cache.identity.temperatures
    positions_N = np.empty(num_rows, np.uint32)
    tail_logsumexps_NM = torch.empty(num_rows, len(temperatures))
    rows = TeacherRows(
        ids_NK=torch.empty(num_rows, top_k, dtype=torch.int64),
        logprobs_NK=torch.empty(num_rows, top_k),
        tail_logmass_N=torch.empty(num_rows),
        tail_logsumexps_NM=tail_logsumexps_NM,
        other_temperatures=temperatures,
    )
    start = 0
    for stored in cache.rows_of([block.key for block in blocks]):
        part = slice(start, start + len(stored.positions_N))
        positions_N[part] = stored.positions_N
        tail_logsumexps_NM.numpy()[part] = stored.tail_logsumexps_NM
        _write(stored, rows[part])
        start = part.stop
    # Blocks are read whole, but the range may begin or end within one.
    low, high = np.searchsorted(positions_N, (first_token, end)).tolist()
    return rows[low:high]


def _write(stored: StoredRows, rows: TeacherRows) -> None:
    """Write one block's rows into `rows`, which has as many rows."""
    ids_NK, logprobs_NK = padded_rows(stored, rows.ids_NK.shape[1])
    # Torch copies with all its threads, and converts float16 to float32 ten times as fast as numpy.
    rows.ids_NK.copy_(torch.from_numpy(ids_NK.view(np.int32)))
    rows.logprobs_NK.copy_(torch.from_numpy(logprobs_NK))
    rows.tail_logmass_N.numpy()[:] = stored.tail_logmass_N
