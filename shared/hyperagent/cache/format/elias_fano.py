"""Elias-Fano coding of an ascending sequence of integers in about 2 + log2(universe / count) bits each.

Every number is split into `low` bits, which are stored directly, and the rest, which is stored in unary as one bit
set at `rest + index`, so that the rests take at most two bits per number (Elias, "Efficient Storage and
Retrieval by Content and Address of Static Files", 1974; Vigna, "Quasi-succinct indices", 2013).

`low` is one of the widths that can be unpacked bytewise: whole bytes plus one field of 0, 1, 2 or 4 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import CorruptRecord

_FIELD_BITS = (0, 1, 2, 4)
WIDTHS = tuple(8 * whole + field for whole in range(3) for field in _FIELD_BITS)


def low_bits(count: int, universe: int) -> int:
    """Return the width in `WIDTHS` with which `count` numbers below `universe` take the fewest bytes."""
    return min(WIDTHS, key=lambda low: encoded_bytes(count, universe, low))


def encoded_bytes(count: int, universe: int, low: int | None = None) -> int:
    """Return the encoded size in bytes of `count` numbers below `universe`."""
    low = low_bits(count, universe) if low is None else low
    whole, field = divmod(low, 8)
    return whole * count + -(-field * count // 8) + _unary_bytes(count, universe, low)


def encode(numbers: NDArray[np.uint32], universe: int) -> bytes:
    """Encode strictly ascending `numbers` [n], each below `universe`, which is at most 2**32."""
    low = low_bits(len(numbers), universe)
    whole, field = divmod(low, 8)
    parts = [(numbers >> np.uint32(8 * index)).astype(np.uint8).tobytes() for index in range(whole)]
    if field:
        parts.append(_pack((numbers >> np.uint32(8 * whole)).astype(np.uint8) & np.uint8((1 << field) - 1), field))
    bits = np.zeros(8 * _unary_bytes(len(numbers), universe, low), np.uint8)
    bits[(numbers >> np.uint32(low)).astype(np.int64) + np.arange(len(numbers))] = 1
    parts.append(np.packbits(bits, bitorder="little").tobytes())
    return b"".join(parts)


def decode(content: memoryview, count: int, universe: int) -> NDArray[np.uint32]:
    """Decode the numbers [count] that `encode` was given.

    Raises:
        CorruptRecord: `content` does not hold `count` numbers.
    """
    low = low_bits(count, universe)
    whole, field = divmod(low, 8)
    if len(content) != encoded_bytes(count, universe, low):
        raise CorruptRecord(f"its ids take {len(content)} bytes, not {encoded_bytes(count, universe, low)}")
    planes = np.frombuffer(content[: whole * count], np.uint8).reshape(whole, count)
    end = whole * count + -(-field * count // 8)
    unary = np.unpackbits(np.frombuffer(content[end:], np.uint8), bitorder="little")
    ones = np.flatnonzero(unary.view(np.bool_))
    if len(ones) != count:
        raise CorruptRecord(f"it holds {len(ones)} ids, but {count} were expected")
    numbers: NDArray[np.uint32] = (ones - np.arange(count)).astype(np.uint32)
    if field:
        numbers <<= np.uint32(field)
        numbers |= _unpack(np.frombuffer(content[whole * count : end], np.uint8), field, count)
    for plane in planes[::-1]:
        numbers <<= np.uint32(8)
        numbers |= plane
    return numbers


def _unary_bytes(count: int, universe: int, low: int) -> int:
    return -(-(count + (universe >> low) + 1) // 8)


def _pack(values: NDArray[np.uint8], width: int) -> bytes:
    """Pack `values` of `width` bits each, the first in the lowest bits of a byte."""
    per_byte = 8 // width
    padded = np.zeros(-(-len(values) // per_byte) * per_byte, np.uint8)
    padded[: len(values)] = values
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1)
    return packed.tobytes()


def _unpack(packed: NDArray[np.uint8], width: int, count: int) -> NDArray[np.uint8]:
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    fields = np.arange(256, dtype=np.uint8)[:, None] >> shifts & np.uint8((1 << width) - 1)
    return fields[packed].reshape(-1)[:count]
