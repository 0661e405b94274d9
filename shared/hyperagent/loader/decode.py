"""The codecs' decoders as torch operations, so that a block's packed bytes can be decoded on the device that needs them.

The bytes are specified in docs/cache-format.md; `hyperagent.cache.format.codecs` is the host's decoder of the same.

Legend of shape suffixes: N rows, K the most ids that a row keeps, n kept ids of all rows together, M temperatures besides 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hyperagent.cache.format.codecs import ARCHIVE, CODEC_OF_CODE, COMPACT, EXACT
from hyperagent.cache.format.elias_fano import encoded_bytes, low_bits
from hyperagent.cache.format.record import Header
from hyperagent.errors import CorruptRecord


class DeviceRows(NamedTuple):
    """A block's rows; the fields are those of `hyperagent.loader.rows.RowTensors`."""

    positions_N: Tensor
    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_logmass_N: Tensor
    target_logprob_N: Tensor
    tail_logsumexps_NM: Tensor


def decode_on_device(
    header: Header, payload: memoryview, *, vocab_size: int, num_temperatures: int, device: torch.device
) -> DeviceRows:
    """The rows of a block whose payload's checksum fits.

    Raises:
        CorruptRecord: the payload is not what the header says.
    """
    codec = CODEC_OF_CODE.get(header.codec)
    if codec is None:
        raise CorruptRecord(f"it is no block of a known codec: {header.codec}")
    N, K, n = header.num_rows, header.top_k, header.num_kept
    scalar = torch.float32 if codec is EXACT else torch.float16
    is_ragged = n != N * K
    of_scalar = scalar.itemsize * N
    sizes = [of_scalar, of_scalar, of_scalar * num_temperatures, 2 * N * is_ragged, -(-header.num_tokens // 8)]
    content_bytes = len(payload) - sum(sizes)
    if content_bytes < 0:
        raise CorruptRecord(f"its payload has {len(payload)} bytes, too few for {N} rows")
    # A copy, because a tensor cannot be of bytes that must not be written.
    packed = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    content, tail, target, tails, counts, bitmap = torch.split(packed, [content_bytes, *sizes])
    offsets_N = _bits(bitmap).nonzero().flatten()
    counts_N = (
        _as(counts, torch.int16).long() & 0xFFFF if is_ragged else torch.full((N,), K, dtype=torch.int64, device=device)
    )
    if len(offsets_N) != N or (is_ragged and int(counts_N.sum()) != n):
        raise CorruptRecord(f"its rows and counts are not the {N} rows and {n} ids of its header")
    decode = _DECODERS[codec.name]
    ids_n, logprobs_n = decode(content, counts_N, n, vocab_size)
    ids_NK, logprobs_NK = _pad(ids_n, logprobs_n, counts_N, K)
    return DeviceRows(
        (offsets_N + header.first_token).int(), ids_NK, logprobs_NK, _as(tail, scalar).float(),
        _as(target, scalar).float(), _as(tails, scalar).float().view(N, num_temperatures),
    )  # fmt: skip


def _exact(content: Tensor, counts_N: Tensor, n: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    del counts_N, vocab_size
    _require_bytes(content, 6 * n)
    return _as(content[: 4 * n], torch.int32), _as(content[4 * n :], torch.float16).float()


def _compact(content: Tensor, counts_N: Tensor, n: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    N = len(counts_N)
    universe = N * vocab_size
    _require_bytes(content, 6 * N + n + encoded_bytes(n, universe))
    highest_N, step_N = _as(content[: 4 * N], torch.float32), _as(content[4 * N : 6 * N], torch.float16).float()
    rows_n = _row_of_id(counts_N, n)
    # As a product and then a sum, not fused: the host's bits.
    logprobs_n = content[6 * N : 6 * N + n].float() * -step_N[rows_n]
    logprobs_n = logprobs_n + highest_N[rows_n]
    return (_elias_fano(content[6 * N + n :], n, universe) - rows_n * vocab_size).int(), logprobs_n


def _elias_fano(content: Tensor, count: int, universe: int) -> Tensor:
    """The rising numbers (int64) that `hyperagent.cache.format.elias_fano.encode` was given."""
    whole, field = divmod(low_bits(count, universe), 8)
    field_bytes = -(-field * count // 8)
    planes = content[: whole * count].view(whole, count)
    packed, unary = content[whole * count :].tensor_split([field_bytes])
    ones = _bits(unary).nonzero().flatten()
    if len(ones) != count:
        raise CorruptRecord(f"it holds {len(ones)} ids where {count} belong")
    numbers = ones - torch.arange(count, device=content.device)
    if field:
        shifts = torch.arange(0, 8, field, dtype=torch.uint8, device=content.device)
        fields = (packed[:, None] >> shifts) & ((1 << field) - 1)
        numbers = numbers << field | fields.flatten()[:count]
    for plane in planes.flip(0):
        numbers = numbers << 8 | plane
    return numbers


def _archive(content: Tensor, counts_N: Tensor, n: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    del vocab_size
    N = len(counts_N)
    # Entropy coding is undone on the host; what it gives is sent on.
    planes = ARCHIVE.planes(memoryview(content.cpu().numpy().tobytes()), N, n)
    low, middle, high, steps_low, steps_high = (
        torch.frombuffer(bytearray(plane), dtype=torch.uint8).to(content.device).long() for plane in planes
    )
    gaps = low | middle << 8 | high << 16
    sums, starts = gaps.cumsum(0), counts_N.cumsum(0) - counts_N
    rows_n = _row_of_id(counts_N, n)
    # The sum runs on over the rows; what it had reached before a row is taken off again.
    ids_n = sums - (sums - gaps)[starts][rows_n]
    table = torch.from_numpy(ARCHIVE.logprob_of_step).to(content.device)
    shift_N = _as(content[: 2 * N], torch.float16).float()
    return ids_n.int(), table[steps_low | steps_high << 8] + shift_N[rows_n]


_Decoder = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
_DECODERS: dict[str, _Decoder] = {EXACT.name: _exact, COMPACT.name: _compact, ARCHIVE.name: _archive}


def _pad(ids_n: Tensor, logprobs_n: Tensor, counts_N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    N = len(counts_N)
    if len(ids_n) == N * top_k:
        return ids_n.view(N, top_k), logprobs_n.view(N, top_k)
    is_kept_NK = torch.arange(top_k, device=ids_n.device) < counts_N[:, None]
    ids_NK = ids_n[counts_N.cumsum(0) - counts_N][:, None].repeat(1, top_k)
    logprobs_NK = torch.full((N, top_k), -torch.inf, device=ids_n.device)
    ids_NK[is_kept_NK] = ids_n
    logprobs_NK[is_kept_NK] = logprobs_n
    return ids_NK, logprobs_NK


def _row_of_id(counts_N: Tensor, n: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts_N), device=counts_N.device), counts_N, output_size=n)


def _bits(content: Tensor) -> Tensor:
    """The bits of bytes, each byte's lowest first."""
    return ((content[:, None] >> torch.arange(8, dtype=torch.uint8, device=content.device)) & 1).flatten()


def _as(content: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy begins where any type may; a part of a record need not.
    return content.clone().view(dtype)


def _require_bytes(content: Tensor, expected: int) -> None:
    if len(content) != expected:
        raise CorruptRecord(f"its ids take {len(content)} bytes, not {expected}")
