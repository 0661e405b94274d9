"""Rows of the cache as tensors: of a whole trajectory or of a range of its tokens, on the host or on a GPU.

On the host the rows of all blocks are written side by side into one set of tensors, pinned if the caller wants to send
them on. On another device the packed bytes are sent, a third to a half of what the tensors take, and decoded there.

Legend of shape suffixes: N rows, K the most ids that a row keeps, n kept ids of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperagent.cache.readable import ReadableCache
from hyperagent.cache.record import BlockOfTrajectory, StoredRows
from hyperagent.cache.rows import padded_rows
from hyperagent.errors import InvalidRequest
from hyperagent.loader.decode import decode_on_device

_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class RowTensors:
    """The teacher's distributions at N positions; a row's ids come in the order that its codec stores them in.

    A row that keeps fewer than K ids ends in padding, which repeats its first id with a log-probability of -inf.
    """

    positions_N: Tensor
    """int32, in the trajectory, rising."""
    ids_NK: Tensor
    """int32."""
    logprobs_NK: Tensor
    """float32, natural; with the tail they sum to 1 but for rounding."""
    tail_logmass_N: Tensor
    """float32; -inf where nothing is left outside the kept ids."""
    target_logprob_N: Tensor
    """float32."""

    @property
    def num_rows(self) -> int:
        return int(self.positions_N.shape[0])

    def normalised(self) -> RowTensors:
        """The same rows with kept and tail mass scaled to sum to 1, undoing rounding in storage."""
        log_total_N = torch.logaddexp(self.logprobs_NK.double().logsumexp(dim=1), self.tail_logmass_N.double())
        return replace(
            self,
            logprobs_NK=(self.logprobs_NK - log_total_N[:, None]).float(),
            tail_logmass_N=(self.tail_logmass_N - log_total_N).float(),
        )


def load_rows(
    cache: ReadableCache,
    key: str,
    *,
    first_token: int = 0,
    end_token: int | None = None,
    device: torch.device = _HOST,
    pinned: bool = False,
) -> RowTensors:
    """The rows at the positions from `first_token` to before `end_token` of one trajectory; by default all.

    Args:
        device: where the rows are decoded and stay.
        pinned: put them into page-locked memory, from which a GPU copies while the host goes on.

    Raises:
        NotFound: the cache has no such trajectory.
        CorruptRecord: a record is damaged; says which and how to mend it.
        InvalidRequest: the range is not one of the trajectory's.
        StorageError: the file system refused.
    """
    trajectory = cache.trajectory(key)
    end = trajectory.num_tokens if end_token is None else end_token
    if not 0 <= first_token <= end <= trajectory.num_tokens:
        raise InvalidRequest(
            f"tokens {first_token} to {end} are not a range of a trajectory of {trajectory.num_tokens} tokens"
        )
    size = cache.settings.block_tokens
    blocks = [b for b in trajectory.blocks if b.index * size < end and (b.index + 1) * size > first_token]
    if device.type == "cpu":
        rows = _decode_on_host(cache, blocks, pinned=pinned)
    else:
        rows = _decode_on_device(cache, blocks, device)
    if (first_token, end) == (0, trajectory.num_tokens):
        return rows
    # Blocks are whole, the range need not be.
    low, high = torch.searchsorted(rows.positions_N, torch.tensor([first_token, end], device=device)).tolist()
    return RowTensors(
        rows.positions_N[low:high],
        rows.ids_NK[low:high],
        rows.logprobs_NK[low:high],
        rows.tail_logmass_N[low:high],
        rows.target_logprob_N[low:high],
    )


def _decode_on_host(cache: ReadableCache, blocks: Sequence[BlockOfTrajectory], *, pinned: bool) -> RowTensors:
    rows = _empty(sum(block.num_rows for block in blocks), cache.identity.top_k, _HOST, pinned=pinned)
    start = 0
    for stored in cache.rows_of([block.key for block in blocks]):
        _write(stored, rows, start)
        start += len(stored.positions_N)
    return rows


def _write(stored: StoredRows, rows: RowTensors, start: int) -> None:
    """Write one block's rows to where they belong."""
    part = slice(start, start + len(stored.positions_N))
    top_k = rows.ids_NK.shape[1]
    ids_NK, logprobs_NK = padded_rows(stored, top_k)
    rows.positions_N.numpy()[part] = stored.positions_N
    rows.ids_NK.numpy()[part] = ids_NK
    rows.logprobs_NK.numpy()[part] = logprobs_NK
    rows.tail_logmass_N.numpy()[part] = stored.tail_logmass_N
    rows.target_logprob_N.numpy()[part] = stored.target_logprob_N


def _decode_on_device(cache: ReadableCache, blocks: Sequence[BlockOfTrajectory], device: torch.device) -> RowTensors:
    vocab_size = cache.identity.vocab_size
    parts = [
        decode_on_device(header, payload, vocab_size=vocab_size, device=device)
        for header, payload in cache.records_of([block.key for block in blocks])
    ]
    if not parts:
        return _empty(0, cache.identity.top_k, device, pinned=False)
    return RowTensors(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _empty(num_rows: int, top_k: int, device: torch.device, *, pinned: bool) -> RowTensors:
    def column(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)

    return RowTensors(
        column(num_rows, dtype=torch.int32),
        column(num_rows, top_k, dtype=torch.int32),
        column(num_rows, top_k),
        column(num_rows),
        column(num_rows),
    )
