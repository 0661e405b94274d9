"""What rows will take on disk, before there are any."""

from __future__ import annotations

from math import lgamma, log

from hyperagent.cache.format.codecs import COMPACT, EXACT
from hyperagent.cache.format.elias_fano import encoded_bytes

_BLOCK_ROWS = 1024
_ARCHIVED_VALUE_BYTES = 0.55
"""What a log-probability takes in the archive codec, measured on real rows (docs/results.md)."""


def bytes_per_row(codec: str, *, top_k: int, vocab_size: int, num_temperatures: int) -> float:
    """Bytes of a row that keeps `top_k` ids; of the archive codec an estimate that supposes ids without a pattern."""
    num_scalars = 2 + num_temperatures
    match codec:
        case EXACT.name:
            return 6.0 * top_k + 4 * num_scalars
        case COMPACT.name:
            return (
                encoded_bytes(_BLOCK_ROWS * top_k, _BLOCK_ROWS * vocab_size) / _BLOCK_ROWS + top_k + 6 + 2 * num_scalars
            )
        case _:
            # log2 of the number of sets of `top_k` ids.
            bits = (lgamma(vocab_size + 1) - lgamma(top_k + 1) - lgamma(vocab_size - top_k + 1)) / log(2)
            return bits / 8 + _ARCHIVED_VALUE_BYTES * top_k + 2 + 2 * num_scalars
