"""Rows of the cache as tensors: of a whole trajectory or of a range of its tokens, on the host or on a GPU.

On the host the rows of all blocks are written side by side into one set of tensors, pinned if the caller wants to send
them on. On another device the packed bytes are sent, a third to a half of what the tensors take, and decoded there.

Legend of shape suffixes: N rows, K the most ids that a row keeps, M temperatures besides 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hyperagent.cache.base import CacheReader
from hyperagent.cache.format.convert import padded_rows
from hyperagent.cache.format.record import BlockOfTrajectory, StoredRows
from hyperagent.errors import ConfigError, InvalidRequest
from hyperagent.identity import TeacherIdentity
from hyperagent.loader.decode import DeviceRows, decode_on_device

_HOST = torch.device("cpu")

# Torch warns, once in a process, of a tensor that shares memory with an array that must not be written to. Those here are
# only copied from.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))


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
    tail_logsumexps_NM: Tensor
    """float32, the tail at `temperatures`; see `hyperagent.topk.TopKRows`."""
    temperatures: tuple[float, ...]

    @property
    def num_rows(self) -> int:
        return int(self.positions_N.shape[0])

    def at_temperature(self, temperature: float = 1.0) -> RowTensors:
        """The same rows' kept and tail mass under the softmax at a temperature, each row summing to 1.

        At 1 that undoes rounding in storage and nothing else. The target's log-probability stays that at 1.

        Raises:
            ConfigError: the teacher has not recorded the tail at this temperature.
        """
        tail_N = self._tail_at(temperature).double()
        logits_NK = self.logprobs_NK.double() / temperature
        log_total_N = torch.logaddexp(logits_NK.logsumexp(dim=1), tail_N)
        return replace(
            self,
            logprobs_NK=(logits_NK - log_total_N[:, None]).float(),
            tail_logmass_N=(tail_N - log_total_N).float(),
        )

    def _tail_at(self, temperature: float) -> Tensor:
        if temperature == 1:
            return self.tail_logmass_N
        require_temperature(temperature, self.temperatures)
        return self.tail_logsumexps_NM[:, self.temperatures.index(temperature)]


def require_temperature(temperature: float, temperatures: Sequence[float]) -> None:
    """Refuse a temperature at which a teacher with these `temperatures` has no rows.

    Raises:
        ConfigError: naming those there are.
    """
    if temperature not in (1, *temperatures):
        there_are = ", ".join(f"{known:g}" for known in (1, *temperatures))
        raise ConfigError(
            f"the cache has rows at temperatures {there_are}, not at {temperature:g}; take one of these, or populate "
            "another cache from a teacher served with --temperatures"
        )


def load_rows(
    cache: CacheReader,
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
    if (first_token, end) != (0, trajectory.num_tokens):
        # Blocks are whole, the range need not be.
        low, high = np.searchsorted(rows.positions_N.cpu().numpy(), (first_token, end))
        rows = DeviceRows(*(column[low:high] for column in rows))
    return RowTensors(*rows, cache.identity.temperatures)


def _decode_on_host(cache: CacheReader, blocks: Sequence[BlockOfTrajectory], *, pinned: bool) -> DeviceRows:
    rows = _empty(sum(block.num_rows for block in blocks), cache.identity, _HOST, pinned=pinned)
    start = 0
    for stored in cache.rows_of([block.key for block in blocks]):
        _write(stored, rows, start)
        start += len(stored.positions_N)
    return rows


def _write(stored: StoredRows, rows: DeviceRows, start: int) -> None:
    """Write one block's rows to where they belong."""
    part = slice(start, start + len(stored.positions_N))
    ids_NK, logprobs_NK = padded_rows(stored, rows.ids_NK.shape[1])
    rows.positions_N.numpy()[part] = stored.positions_N
    # Torch copies on all its threads, and turns float16 into float32 ten times as fast as numpy does.
    rows.ids_NK[part] = torch.from_numpy(ids_NK.view(np.int32))
    rows.logprobs_NK[part] = torch.from_numpy(logprobs_NK)
    rows.tail_logmass_N.numpy()[part] = stored.tail_logmass_N
    rows.target_logprob_N.numpy()[part] = stored.target_logprob_N
    rows.tail_logsumexps_NM.numpy()[part] = stored.tail_logsumexps_NM


def _decode_on_device(cache: CacheReader, blocks: Sequence[BlockOfTrajectory], device: torch.device) -> DeviceRows:
    vocab_size, num_temperatures = cache.identity.vocab_size, len(cache.identity.temperatures)
    parts = [
        decode_on_device(header, payload, vocab_size=vocab_size, num_temperatures=num_temperatures, device=device)
        for header, payload in cache.records_of([block.key for block in blocks])
    ]
    if not parts:
        return _empty(0, cache.identity, device, pinned=False)
    return DeviceRows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _empty(num_rows: int, identity: TeacherIdentity, device: torch.device, *, pinned: bool) -> DeviceRows:
    def column(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)

    return DeviceRows(
        column(num_rows, dtype=torch.int32),
        column(num_rows, identity.top_k, dtype=torch.int32),
        column(num_rows, identity.top_k),
        column(num_rows),
        column(num_rows),
        column(num_rows, len(identity.temperatures)),
    )
