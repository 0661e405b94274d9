"""One cache record: the top-k rows of one trajectory as bytes, with their checksum.

The layout is specified in docs/cache-format.md. Numbers are little-endian; arrays are row-major.

    header     magic "HATK", version u16, reserved u16, N u32, K u32, tokens u32, key 32 bytes
    positions  u32 [N]
    ids        u32 [N, K]
    logprobs   f16 [N, K]
    tail       f32 [N]
    target     f32 [N]
    digest     BLAKE3 of everything before, 32 bytes

float16 keeps 11 significant bits: a log-probability of -10 is off by at most 0.004.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from hyperagent.errors import CorruptRecord
from hyperagent.topk import TopKRows

FORMAT_VERSION = 1
_MAGIC = b"HATK"
_HEADER = struct.Struct("<4sHHIII32s")
_DIGEST_BYTES = 32
# Smallest float16: a log-probability below it would become -inf, and its probability is zero anyway.
_LOWEST = float(np.finfo(np.float16).min)


@dataclass(frozen=True, eq=False)
class CachedRecord:
    """What the cache holds of one trajectory."""

    rows: TopKRows
    num_tokens: int
    """Tokens of the trajectory, context included."""


def record_bytes(num_rows: int, top_k: int) -> int:
    """Size of a record."""
    return _HEADER.size + sum(_array_bytes(num_rows, top_k)) + _DIGEST_BYTES


def record_digest(content: bytes) -> str:
    """The digest (hex) that a record ends with."""
    return content[-_DIGEST_BYTES:].hex()


def cache_digest(digests: Mapping[str, str]) -> str:
    """One digest (hex) of many records, given by key: two caches with the same one hold the same bytes."""
    digest = blake3()
    for key in sorted(digests):
        digest.update(bytes.fromhex(key + digests[key]))
    return digest.hexdigest()


def encode_record(key: str, rows: TopKRows, *, num_tokens: int) -> bytes:
    """The record of valid `rows` (see `TopKRows.validate`)."""
    header = _HEADER.pack(_MAGIC, FORMAT_VERSION, 0, rows.num_rows, rows.top_k, num_tokens, bytes.fromhex(key))
    content = b"".join(
        [
            header,
            rows.positions.astype("<u4", copy=False).tobytes(),
            rows.ids.astype("<u4", copy=False).tobytes(),
            np.maximum(rows.logprobs, _LOWEST).astype("<f2").tobytes(),
            rows.tail_logmass.astype("<f4", copy=False).tobytes(),
            rows.target_logprob.astype("<f4", copy=False).tobytes(),
        ]
    )
    return content + blake3(content).digest()


def decode_record(content: bytes, *, key: str) -> CachedRecord:
    """The rows of a record; every byte is checked.

    Raises:
        CorruptRecord: the bytes are not the record of `key` that was written; says how they differ.
    """
    if len(content) < _HEADER.size + _DIGEST_BYTES:
        raise CorruptRecord(f"it has {len(content)} bytes, fewer than a header and a digest")
    body = memoryview(content)[:-_DIGEST_BYTES]
    if blake3(body).digest() != content[-_DIGEST_BYTES:]:
        raise CorruptRecord("its checksum does not fit")
    magic, version, _, n, k, num_tokens, found_key = _HEADER.unpack_from(content)
    if magic != _MAGIC or version != FORMAT_VERSION:
        raise CorruptRecord(f"it is of format {magic!r} version {version}, not {_MAGIC!r} version {FORMAT_VERSION}")
    if found_key.hex() != key:
        raise CorruptRecord(f"it is the record of another key, {found_key.hex()}")
    sizes = _array_bytes(n, k)
    if _HEADER.size + sum(sizes) != len(body):
        raise CorruptRecord(f"it has {len(body)} bytes where {n} rows of {k} ids need {_HEADER.size + sum(sizes)}")
    parts = []
    start = _HEADER.size
    for size in sizes:
        parts.append(body[start : start + size])
        start += size
    rows = TopKRows(
        positions=np.frombuffer(parts[0], "<u4").astype(np.uint32, copy=False),
        ids=np.frombuffer(parts[1], "<u4").reshape(n, k).astype(np.uint32, copy=False),
        logprobs=np.frombuffer(parts[2], "<f2").reshape(n, k).astype(np.float32),
        tail_logmass=np.frombuffer(parts[3], "<f4").astype(np.float32, copy=False),
        target_logprob=np.frombuffer(parts[4], "<f4").astype(np.float32, copy=False),
    )
    return CachedRecord(rows, num_tokens)


def _array_bytes(n: int, k: int) -> list[int]:
    """Of positions, ids, log-probabilities, tails and targets."""
    return [4 * n, 4 * n * k, 2 * n * k, 4 * n, 4 * n]
