"""Three codecs for a block's kept ids and log-probabilities, from uncompressed to entropy-coded.

    exact    ids as u32 and log-probabilities as float16, by rank; decoding needs no computation
    compact  ids sorted and Elias-Fano coded; log-probabilities as 8 bits between the row's minimum and maximum
    archive  ids as gaps; log-probabilities in steps that grow as probability falls; all entropy-coded

The two lossy codecs shift a row's log-probabilities to preserve the kept mass, because otherwise the student would
learn a tail that the teacher did not have. Their distortion on real rows is in docs/results.md.

Legend of shape suffixes: N rows, n = kept ids of all rows together, row after row.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from hyperagent.cache.format import elias_fano
from hyperagent.errors import CorruptRecord

_T = TypeVar("_T", bound=np.generic)
Floats = NDArray[np.floating]
LOWEST_F16 = float(np.finfo(np.float16).min)
"""Lower bound for log-probabilities: lower ones would become -inf in float16, and their probability is negligible."""


@dataclass(frozen=True, eq=False)
class KeptIds:
    """Kept ids of N rows, concatenated without padding as codecs store them; each row keeps at least one."""

    counts_N: NDArray[np.int64]
    ids_n: NDArray[np.uint32]
    """Token ids, shape [n], distinct within a row."""
    logprobs_n: Floats


class Codec(Protocol):
    """Encode kept ids to bytes and decode them."""

    @property
    def name(self) -> str:
        """Name of the codec in a cache's settings."""

    @property
    def code(self) -> int:
        """Number of the codec in a record's header."""

    @property
    def by_rank(self) -> bool:
        """Whether decoded ids are sorted by descending log-probability, ties by id; otherwise they are sorted by id."""

    @property
    def scalar(self) -> type[np.floating]:
        """Dtype in which a row's tail and target are stored."""

    def encode(self, kept: KeptIds, *, vocab_size: int) -> tuple[bytes, Floats]:
        """Return the bytes of `kept` and the log-probabilities [n] that decoding will give, in input order."""

    def decode(self, content: memoryview, counts_N: NDArray[np.int64], *, vocab_size: int) -> KeptIds:
        """Return what `encode` was given, up to rounding; arrays may share memory with `content`.

        Raises:
            CorruptRecord: `content` does not hold the expected number of ids.
        """


class Exact:
    """Uncompressed codec; see the module docstring."""

    name, code, by_rank, scalar = "exact", 1, True, np.float32

    def encode(self, kept: KeptIds, *, vocab_size: int) -> tuple[bytes, Floats]:
        """Encode as u32 [n] ids and f16 [n] log-probabilities."""
        del vocab_size
        rounded_n = np.maximum(kept.logprobs_n, LOWEST_F16).astype(np.float16)
        # Rounding makes ties, and ties are ordered by id. The bits of positive float16 values sort like the values.
        rows_n = _per_id(np.arange(len(kept.counts_N), dtype=np.uint64), kept.counts_N)
        ordered_n = rows_n << np.uint64(48) | (np.float16(0) - rounded_n).view(np.uint16).astype(
            np.uint64
        ) << np.uint64(32)
        ordered_n |= kept.ids_n
        ordered_n.sort()
        logprobs_n = -(ordered_n >> np.uint64(32)).astype(np.uint16).view(np.float16)
        return ordered_n.astype("<u4").tobytes() + logprobs_n.astype("<f2").tobytes(), rounded_n

    def decode(self, content: memoryview, counts_N: NDArray[np.int64], *, vocab_size: int) -> KeptIds:
        """See `Codec.decode`; the arrays are views of `content`."""
        del vocab_size
        n = int(counts_N.sum())
        _require_bytes(content, 6 * n)
        return KeptIds(counts_N, np.frombuffer(content[: 4 * n], "<u4"), np.frombuffer(content[4 * n :], "<f2"))


class Compact:
    """Codec with 8-bit log-probabilities and Elias-Fano coded ids; see the module docstring."""

    name, code, by_rank, scalar = "compact", 2, False, np.float16

    def encode(self, kept: KeptIds, *, vocab_size: int) -> tuple[bytes, Floats]:
        """Encode as f32 [N] maximum, f16 [N] step, u8 [n] steps below the maximum, Elias-Fano of row * vocabulary + id."""
        starts = _starts(kept.counts_N)
        logprobs_n = kept.logprobs_n.astype(np.float32)
        highest = np.maximum.reduceat(logprobs_n, starts)
        span = highest - np.minimum.reduceat(logprobs_n, starts)
        # Rounded up, so that the minimum is at most 255 steps below the maximum.
        step = np.nextafter((span / 255).astype(np.float16), np.float16(np.inf), dtype=np.float16)
        highest_n, step_n = _per_id(highest, kept.counts_N), _per_id(step.astype(np.float32), kept.counts_N)
        steps_n = np.rint((highest_n - logprobs_n) / step_n).astype(np.uint8)
        highest = highest + _mass_shift(logprobs_n, highest_n - steps_n * step_n, starts)
        read_n = _per_id(highest, kept.counts_N) - steps_n * step_n
        numbers_n, steps_n = _sorted_by_id(kept, steps_n, vocab_size)
        content = b"".join(
            [
                highest.astype("<f4").tobytes(),
                step.astype("<f2").tobytes(),
                steps_n.astype(np.uint8).tobytes(),
                elias_fano.encode(numbers_n, len(kept.counts_N) * vocab_size),
            ]
        )
        return content, read_n

    def decode(self, content: memoryview, counts_N: NDArray[np.int64], *, vocab_size: int) -> KeptIds:
        """See `Codec.decode`."""
        N, n = len(counts_N), int(counts_N.sum())
        universe = N * vocab_size
        _require_bytes(content, 6 * N + n + elias_fano.encoded_bytes(n, universe))
        highest = np.frombuffer(content[: 4 * N], "<f4")
        step = np.frombuffer(content[4 * N : 6 * N], "<f2").astype(np.float32)
        logprobs_n = np.frombuffer(content[6 * N : 6 * N + n], np.uint8).astype(np.float32)
        logprobs_n *= _per_id(-step, counts_N)
        logprobs_n += _per_id(highest, counts_N)
        numbers_n = elias_fano.decode(content[6 * N + n :], n, universe)
        return KeptIds(counts_N, _without_rows(numbers_n, counts_N, vocab_size), logprobs_n)


class Archive:
    """Entropy-coded codec; see the module docstring.

    The cost in KL of an error e in a log-probability is p e**2 / 2, so the cost is the same for all ids if the step is
    proportional to 1 / sqrt(p): the square root of the probability is rounded to a grid. Below the probability where that step
    would reach `_WIDEST` nats, log-probabilities are rounded to multiples of it, so that no error exceeds half of it.
    """

    name, code, by_rank, scalar = "archive", 3, False, np.float16

    _FINEST = 0.02
    """Step in nats at probability 1."""
    _WIDEST = 0.25
    _LEVEL = 9
    _HEADER = struct.Struct("<5I")

    def __init__(self) -> None:
        self._turn = (self._FINEST / self._WIDEST) ** 2
        """Probability below which the step is constant."""
        self._turn_step = 2 * (1 - self._turn**0.5) / self._FINEST
        steps = np.arange(1 << 16, dtype=np.float64)
        with np.errstate(divide="ignore"):
            upper = 2 * np.log(np.maximum(1 - steps * self._FINEST / 2, 0))
        lower = np.log(self._turn) - (steps - self._turn_step) * self._WIDEST
        self.logprob_of_step: NDArray[np.float32] = np.where(steps <= self._turn_step, upper, lower).astype(np.float32)

    def encode(self, kept: KeptIds, *, vocab_size: int) -> tuple[bytes, Floats]:
        """Encode as f16 [N] shift, sizes of five zstd frames, then the frames: gaps' low, middle, high byte, steps' low, high."""
        logprobs_n = kept.logprobs_n.astype(np.float64)
        upper_n = 2 * (1 - np.exp(logprobs_n / 2)) / self._FINEST
        lower_n = self._turn_step + (np.log(self._turn) - logprobs_n) / self._WIDEST
        steps_n = (
            np.rint(np.where(upper_n <= self._turn_step, upper_n, lower_n)).clip(0, (1 << 16) - 1).astype(np.uint16)
        )
        starts = _starts(kept.counts_N)
        rounded_n = self.logprob_of_step[steps_n]
        shift = _mass_shift(logprobs_n, rounded_n, starts).astype("<f2")
        numbers_n, steps = _sorted_by_id(kept, steps_n, vocab_size)
        ids = _without_rows(numbers_n, kept.counts_N, vocab_size)
        gaps = np.diff(ids, prepend=np.uint32(0))
        gaps[starts] = ids[starts]
        compress = zstandard.ZstdCompressor(level=self._LEVEL, write_checksum=False).compress
        planes = [gaps, gaps >> np.uint32(8), gaps >> np.uint32(16), steps, steps >> np.uint16(8)]
        frames = [compress(plane.astype(np.uint8).tobytes()) for plane in planes]
        content = b"".join([shift.tobytes(), self._HEADER.pack(*map(len, frames)), *frames])
        return content, rounded_n + _per_id(shift.astype(np.float32), kept.counts_N)

    def decode(self, content: memoryview, counts_N: NDArray[np.int64], *, vocab_size: int) -> KeptIds:
        """See `Codec.decode`."""
        del vocab_size
        N, n = len(counts_N), int(counts_N.sum())
        low, middle, high, steps_low, steps_high = (
            np.frombuffer(plane, np.uint8) for plane in self.planes(content, N, n)
        )
        gaps = low | middle.astype(np.uint32) << np.uint32(8) | high.astype(np.uint32) << np.uint32(16)
        sums = np.cumsum(gaps, dtype=np.uint32)
        starts = _starts(counts_N)
        # The cumulative sum spans all rows; its value before each row is subtracted again. Wraparound is harmless.
        ids_n = sums - _per_id((sums - gaps)[starts], counts_N)
        shift = np.frombuffer(content[: 2 * N], "<f2").astype(np.float32)
        logprobs_n = self.logprob_of_step[steps_low | steps_high.astype(np.uint16) << np.uint16(8)]
        return KeptIds(counts_N, ids_n, logprobs_n + _per_id(shift, counts_N))

    def planes(self, content: memoryview, num_rows: int, num_kept: int) -> list[bytes]:
        """Decompress the five byte planes of the gaps and steps of `num_kept` ids.

        Raises:
            CorruptRecord: `content` does not hold the expected number of ids.
        """
        frames = content[2 * num_rows :]
        if len(frames) < self._HEADER.size:
            raise CorruptRecord(f"its ids take {len(content)} bytes, fewer than their header")
        sizes = self._HEADER.unpack_from(frames)
        _require_bytes(frames, self._HEADER.size + sum(sizes))
        decompress = zstandard.ZstdDecompressor().decompress
        planes, start = [], self._HEADER.size
        for size in sizes:
            try:
                planes.append(decompress(frames[start : start + size], max_output_size=num_kept))
            except zstandard.ZstdError as error:
                raise CorruptRecord(f"its ids cannot be decompressed: {error}") from error
            _require_bytes(memoryview(planes[-1]), num_kept)
            start += size
        return planes


EXACT, COMPACT, ARCHIVE = Exact(), Compact(), Archive()
CODECS: dict[str, Codec] = {codec.name: codec for codec in (EXACT, COMPACT, ARCHIVE)}
CODEC_OF_CODE: dict[int, Codec] = {codec.code: codec for codec in CODECS.values()}


def _starts(counts_N: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(counts_N) - counts_N


def _per_id(values_N: NDArray[_T], counts_N: NDArray[np.int64]) -> NDArray[_T]:
    """Repeat each row's value once for each of its ids."""
    same = bool((counts_N == counts_N[0]).all())
    # With a single count, numpy repeats without reading per-row counts, which is faster.
    return np.repeat(values_N, counts_N[0] if same else counts_N)


def _mass_shift(true_n: Floats, rounded_n: Floats, starts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the offsets [N] to add to each row's rounded log-probabilities to restore the row's true mass."""
    true_N = np.add.reduceat(np.exp(true_n, dtype=np.float64), starts)
    rounded_N = np.add.reduceat(np.exp(rounded_n, dtype=np.float64), starts)
    return np.log(true_N / rounded_N).astype(np.float32)


def _sorted_by_id(
    kept: KeptIds, values_n: NDArray[np.unsignedinteger], vocab_size: int
) -> tuple[NDArray[np.uint32], NDArray[np.unsignedinteger]]:
    """Return row * vocabulary + id in ascending order, and the values (integers of at most 16 bits) in that order."""
    rows = np.arange(len(kept.counts_N), dtype=np.uint64) * np.uint64(vocab_size)
    keyed = (_per_id(rows, kept.counts_N) + kept.ids_n) << np.uint64(16) | values_n.astype(np.uint64)
    keyed.sort()
    return (keyed >> np.uint64(16)).astype(np.uint32), keyed.astype(values_n.dtype)


def _without_rows(numbers_n: NDArray[np.uint32], counts_N: NDArray[np.int64], vocab_size: int) -> NDArray[np.uint32]:
    return numbers_n - _per_id(np.arange(len(counts_N), dtype=np.uint32) * np.uint32(vocab_size), counts_N)


def _require_bytes(content: memoryview, expected: int) -> None:
    if len(content) != expected:
        raise CorruptRecord(f"its ids take {len(content)} bytes, not {expected}")
