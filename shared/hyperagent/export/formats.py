"""File formats for one trajectory's rows: .npz, Parquet and safetensors.

`indices` and `values` are the names that comparable tools use for a teacher's top k. Legend of shape suffixes: T tokens,
N supervised positions, K ids per row, M temperatures other than 1.

    npz, safetensors   token_ids u32 [T], positions u32 [N], indices i32 [N, K], values [N, K], tail_logmass f32 [N],
                       target_logprob f32 [N], tail_logsumexps f32 [N, M]; `values`, the log-probabilities, are float16
                       in .npz and float32 in safetensors; a shorter row is padded with its first id and a value of -inf
    parquet            a row per token: token_id and, if it is supervised, indices, values and tail_logsumexps as
                       lists, tail_logmass and target_logprob
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray

from hyperagent.errors import DataError
from hyperagent.topk import TopKRows


@dataclass(frozen=True, eq=False)
class ExportedTrajectory:
    """Everything a cache needs to store a trajectory."""

    token_ids: NDArray[np.uint32]
    """Token ids, shape [T]."""
    rows: TopKRows


@dataclass(frozen=True)
class FileFormat:
    """Encoder and decoder of one trajectory's file."""

    suffix: str
    encode: Callable[[ExportedTrajectory], bytes]
    read_arrays: Callable[[bytes, int], dict[str, Any]]
    """Function from a file's bytes and K to arrays; raises any error of its library."""

    def decode(self, content: bytes, top_k: int) -> ExportedTrajectory:
        """Return what `encode` was given, up to rounding.

        Raises:
            DataError: the bytes are not a file of this format, or an array is missing or has a wrong shape or type.
        """
        try:
            arrays = self.read_arrays(content, top_k)
        except Exception as error:  # Damaged bytes make these libraries raise almost any error.
            raise DataError(f"it cannot be read: {' '.join(str(error).split())}") from error
        return _from_arrays(arrays)


def _to_npz(trajectory: ExportedTrajectory) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **_arrays(trajectory, np.float16))  # type: ignore[arg-type]  # its stub means another keyword
    return buffer.getvalue()


def _from_npz(content: bytes, top_k: int) -> dict[str, Any]:
    del top_k
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _to_safetensors(trajectory: ExportedTrajectory) -> bytes:
    return safetensors.numpy.save(_arrays(trajectory, np.float32))


def _from_safetensors(content: bytes, top_k: int) -> dict[str, Any]:
    del top_k
    return dict(safetensors.numpy.load(content))


def _to_parquet(trajectory: ExportedTrajectory) -> bytes:
    rows = trajectory.rows
    counts_N = rows.counts
    is_kept_NK = np.arange(rows.top_k) < counts_N[:, None]
    supervised_T = np.zeros(len(trajectory.token_ids), bool)
    supervised_T[rows.positions] = True
    counts_T = np.zeros(len(trajectory.token_ids), np.int64)
    counts_T[rows.positions] = counts_N

    def scalars(values_N: NDArray[np.float32]) -> pa.Array:
        values_T = np.zeros(len(trajectory.token_ids), np.float32)
        values_T[rows.positions] = values_N
        return pa.array(values_T, mask=~supervised_T)

    def lists(values: NDArray[np.generic], counts_T: NDArray[np.int64]) -> pa.Array:
        # A token without a row is null and has no values.
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts_T)]).astype(np.int32))
        return pa.ListArray.from_arrays(offsets, pa.array(values), mask=pa.array(~supervised_T))

    table = pa.table(
        {
            "token_id": pa.array(trajectory.token_ids),
            "indices": lists(rows.ids[is_kept_NK].astype(np.int32), counts_T),
            "values": lists(rows.logprobs[is_kept_NK], counts_T),
            "tail_logmass": scalars(rows.tail_logmass),
            "target_logprob": scalars(rows.target_logprob),
            "tail_logsumexps": lists(rows.tail_logsumexps.ravel(), supervised_T * rows.tail_logsumexps.shape[1]),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _from_parquet(content: bytes, top_k: int) -> dict[str, Any]:
    table = pq.read_table(io.BytesIO(content)).combine_chunks()
    positions = np.flatnonzero(table["indices"].is_valid().to_numpy()).astype(np.uint32)
    supervised = table.take(pa.array(positions)).combine_chunks()
    indices, values = supervised["indices"].combine_chunks(), supervised["values"].combine_chunks()
    counts_N = np.diff(indices.offsets.to_numpy())
    if (counts_N != np.diff(values.offsets.to_numpy())).any() or not 0 < counts_N.min(initial=1) <= top_k:
        raise ValueError(f"a row has no indices, more than the teacher's {top_k}, or not as many values")
    ids_n = indices.flatten().to_numpy()
    is_kept_NK = np.arange(top_k) < counts_N[:, None]
    ids_NK = np.repeat(ids_n[np.cumsum(counts_N) - counts_N], top_k).reshape(-1, top_k)
    ids_NK[is_kept_NK] = ids_n
    logprobs_NK = np.full((len(positions), top_k), -np.inf, np.float32)
    logprobs_NK[is_kept_NK] = values.flatten().to_numpy()
    return {
        "token_ids": table["token_id"].to_numpy(),
        "positions": positions,
        "indices": ids_NK,
        "values": logprobs_NK,
        "tail_logmass": supervised["tail_logmass"].to_numpy(),
        "target_logprob": supervised["target_logprob"].to_numpy(),
        "tail_logsumexps": _matrix(supervised["tail_logsumexps"].combine_chunks()),
    }


def _matrix(lists: pa.ListArray) -> NDArray[Any]:
    widths = np.unique(np.diff(lists.offsets.to_numpy()))
    if len(widths) > 1:
        raise ValueError(f"rows have tails at {widths[0]} to {widths[-1]} temperatures")
    width = int(widths[0]) if len(widths) else 0
    return np.asarray(lists.flatten().to_numpy()).reshape(len(lists), width)


NPZ = FileFormat(".npz", _to_npz, _from_npz)
SAFETENSORS = FileFormat(".safetensors", _to_safetensors, _from_safetensors)
PARQUET = FileFormat(".parquet", _to_parquet, _from_parquet)
FORMATS: dict[str, FileFormat] = {"npz": NPZ, "parquet": PARQUET, "safetensors": SAFETENSORS}

_DIMENSIONS = {
    "token_ids": 1, "positions": 1, "indices": 2, "values": 2, "tail_logmass": 1, "target_logprob": 1,
    "tail_logsumexps": 2,
}  # fmt: skip


def _arrays(trajectory: ExportedTrajectory, values: type[np.floating]) -> dict[str, NDArray[np.generic]]:
    rows = trajectory.rows
    lowest = np.finfo(values).min
    return {
        "token_ids": trajectory.token_ids,
        "positions": rows.positions,
        "indices": rows.ids.astype(np.int32),
        # Values below the range of float16 must not become -inf, which marks padding.
        "values": np.where(np.isneginf(rows.logprobs), -np.inf, np.maximum(rows.logprobs, lowest)).astype(values),
        "tail_logmass": rows.tail_logmass,
        "target_logprob": rows.target_logprob,
        "tail_logsumexps": rows.tail_logsumexps,
    }


def _from_arrays(arrays: dict[str, Any]) -> ExportedTrajectory:
    """Build the trajectory from its arrays and restore the order of ids within rows, which rounding may have changed.

    Raises:
        DataError: an array is missing or has a wrong shape or type.
    """
    for name, dimensions in _DIMENSIONS.items():
        if name not in arrays:
            raise DataError(f"there is no array {name!r}; it needs {', '.join(_DIMENSIONS)}")
        wanted = np.integer if name in ("token_ids", "positions", "indices") else np.floating
        if arrays[name].ndim != dimensions or not np.issubdtype(arrays[name].dtype, wanted):
            raise DataError(f"{name!r} is of type {arrays[name].dtype} and shape {arrays[name].shape}")
        if wanted is np.integer and arrays[name].size and int(arrays[name].min()) < 0:
            raise DataError(f"{name!r} has the negative number {int(arrays[name].min())}")
    ids_NK = arrays["indices"].astype(np.uint32)
    logprobs_NK = arrays["values"].astype(np.float32)
    if ids_NK.shape == logprobs_NK.shape:
        order_NK = np.lexsort((ids_NK, -logprobs_NK), axis=1)
        ids_NK = np.take_along_axis(ids_NK, order_NK, axis=1)
        logprobs_NK = np.take_along_axis(logprobs_NK, order_NK, axis=1)
        # Sorting ties by id has moved the padding ids.
        ids_NK = np.where(np.isneginf(logprobs_NK), ids_NK[:, :1], ids_NK)
    rows = TopKRows(
        positions=arrays["positions"].astype(np.uint32),
        ids=ids_NK,
        logprobs=logprobs_NK,
        tail_logmass=arrays["tail_logmass"].astype(np.float32),
        target_logprob=arrays["target_logprob"].astype(np.float32),
        tail_logsumexps=arrays["tail_logsumexps"].astype(np.float32),
    )
    return ExportedTrajectory(arrays["token_ids"].astype(np.uint32), rows)
