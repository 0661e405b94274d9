"""Estimate of the disk space that rows take before any are stored."""

from __future__ import annotations

from math import lgamma, log

from hyperagent.cache.format.codecs import COMPACT, EXACT
from hyperagent.cache.format.elias_fano import encoded_bytes

_BLOCK_ROWS = 1024
_ARCHIVED_VALUE_BYTES = 0.55
"""Bytes per log-probability in the archive codec, measured on real rows (docs/results.md)."""


def bytes_per_row(codec: str, *, top_k: int, vocab_size: int, num_temperatures: int) -> float:
    """Return the bytes of a row that keeps `top_k` ids; for the archive codec an estimate that assumes random ids."""
    num_scalars = 2 + num_temperatures
    match codec:
        case EXACT.name:
            return 6.0 * top_k + 4 * num_scalars
        case COMPACT.name:
            return (
                encoded_bytes(_BLOCK_ROWS * top_k, _BLOCK_ROWS * vocab_size) / _BLOCK_ROWS + top_k + 6 + 2 * num_scalars
            )
        case _:
            # log2 of the number of possible sets of `top_k` ids.
            bits = (lgamma(vocab_size + 1) - lgamma(top_k + 1) - lgamma(vocab_size - top_k + 1)) / log(2)
            return bits / 8 + _ARCHIVED_VALUE_BYTES * top_k + 2 + 2 * num_scalars
