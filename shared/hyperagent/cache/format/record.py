"""Byte format of records: a header with checksums, and a payload. docs/cache-format.md specifies every byte.

A *block* record holds the rows of up to `block_tokens` consecutive tokens; a *trajectory* record lists the blocks
of one trajectory. Numbers are little-endian; arrays are row-major.

Legend of shape suffixes: N rows of a block, n kept ids of all rows together, M temperatures besides 1.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from hyperagent.cache.format.codecs import CODEC_OF_CODE, LOWEST_F16, Codec, KeptIds
from hyperagent.errors import CorruptRecord
from hyperagent.topk import TopKRows

MAGIC = b"HATKREC2"
ALIGNMENT = 32
"""Records begin at multiples of this many bytes, so that a reader finds the next one after damage."""
_HEADER = struct.Struct("<8s B B H I I I I I 32s 16s f f")
"""Magic, kind, codec, top k, payload bytes, first token, tokens, rows, kept ids, key, payload checksum, KL, mass."""
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_BLOCK_ENTRY = struct.Struct("<II32s")


class Kind(enum.IntEnum):
    """Kind of a record: a block's rows or a trajectory's block list."""

    BLOCK = 1
    TRAJECTORY = 2


@dataclass(frozen=True)
class Header:
    """Header of a record: everything needed to read its payload."""

    kind: Kind
    codec: int
    """Codec number of a block; 0 for a trajectory."""
    top_k: int
    """Largest number of ids that a row keeps."""
    payload_bytes: int
    first_token: int
    """Token at which a block begins; 0 for a trajectory. All trajectories with the same prefix share the block."""
    num_tokens: int
    num_rows: int
    num_kept: int
    """Total number of kept ids in all rows; 0 for a trajectory."""
    key: bytes
    checksum: bytes
    """XXH3-128 of the payload."""
    kl_nats: float
    """Mean over a block's rows of KL(original row || stored row) in nats, over kept ids and tail, both normalized."""
    kept_mass: float
    """Mean over a block's rows of the probability of the kept ids."""

    @property
    def record_bytes(self) -> int:
        """Size of the whole record in bytes, padding included."""
        return padded(HEADER_BYTES + self.payload_bytes)

    def to_bytes(self) -> bytes:
        """Encode the header as `HEADER_BYTES` bytes."""
        fields = _HEADER.pack(
            MAGIC, self.kind, self.codec, self.top_k, self.payload_bytes, self.first_token, self.num_tokens,
            self.num_rows, self.num_kept, self.key, self.checksum, self.kl_nats, self.kept_mass,
        )  # fmt: skip
        return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))

    def payload(self, content: memoryview) -> memoryview:
        """Return the payload that follows this header in a record's bytes."""
        return content[HEADER_BYTES : HEADER_BYTES + self.payload_bytes]

    @classmethod
    def from_bytes(cls, content: memoryview) -> Header:
        """Read the header at the beginning of `content`.

        Raises:
            CorruptRecord: `content` does not begin with a valid header.
        """
        if len(content) < HEADER_BYTES:
            raise CorruptRecord(f"it has {len(content)} bytes, fewer than a header")
        fields = content[: _HEADER.size]
        if content[:8] != MAGIC:
            raise CorruptRecord(f"it begins with {bytes(content[:8])!r}, not with {MAGIC!r}")
        if _CHECKSUM.unpack_from(content, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(fields):
            raise CorruptRecord("its header's checksum does not match")
        _, kind, *rest = _HEADER.unpack(fields)
        try:
            return cls(Kind(kind), *rest)
        except ValueError as error:
            raise CorruptRecord(f"it is of the unknown kind {kind}") from error


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a block as its codec decoded them; the cache's internal form.

    `hyperagent.topk.TopKRows` has one width, one order and one dtype. Here rows keep the codec's order and dtype and are
    not padded, because sorting and widening them takes longer than decoding, and the trainer needs neither.
    """

    positions_N: NDArray[np.uint32]
    """Positions in the trajectory, ascending."""
    kept: KeptIds
    tail_logmass_N: NDArray[np.floating]
    target_logprob_N: NDArray[np.floating]
    tail_logsumexps_NM: NDArray[np.floating]
    """Logsumexps of the tails at the teacher's temperatures; see `hyperagent.topk.TopKRows`."""
    by_rank: bool
    """Whether a row's ids are sorted by descending log-probability, ties by id; otherwise they are sorted by id."""


@dataclass(frozen=True)
class BlockOfTrajectory:
    """One block of a trajectory."""

    index: int
    """Number of the block in the trajectory; the block begins at token `index * block_tokens`."""
    num_rows: int
    key: bytes


def padded(size: int) -> int:
    """Return `size` rounded up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def encode_block(
    key: bytes, rows: TopKRows, *, first_token: int, num_tokens: int, codec: Codec, vocab_size: int
) -> bytes:
    """Encode valid `rows` (see `TopKRows.validate`) whose positions lie in one block as a record.

    Args:
        first_token: token at which the block begins; positions count from the trajectory's beginning.
        num_tokens: number of tokens in the block.
    """
    counts_N = rows.counts
    mask_NK = np.arange(rows.top_k) < counts_N[:, None]
    kept = KeptIds(counts_N, rows.ids[mask_NK], rows.logprobs[mask_NK])
    supervised = np.zeros(num_tokens, np.uint8)
    supervised[rows.positions.astype(np.int64) - first_token] = 1
    scalar = np.dtype(codec.scalar).newbyteorder("<")
    is_ragged = len(kept.ids_n) != rows.num_rows * rows.top_k
    content, stored_n = codec.encode(kept, vocab_size=vocab_size)
    tail_N, tails_NM = (
        np.maximum(tail, LOWEST_F16, where=tail > -np.inf, out=tail.copy()).astype(scalar)
        for tail in (rows.tail_logmass, rows.tail_logsumexps)
    )
    payload = b"".join(
        [
            content,
            tail_N.tobytes(),
            np.maximum(rows.target_logprob, LOWEST_F16).astype(scalar).tobytes(),
            tails_NM.tobytes(),
            counts_N.astype("<u2").tobytes() if is_ragged else b"",
            np.packbits(supervised, bitorder="little").tobytes(),
        ]
    )
    header = Header(
        kind=Kind.BLOCK, codec=codec.code, top_k=rows.top_k, payload_bytes=len(payload), first_token=first_token,
        num_tokens=num_tokens, num_rows=rows.num_rows, num_kept=len(kept.ids_n), key=key,
        checksum=xxhash.xxh3_128_digest(payload),
        kl_nats=_mean_kl(kept, rows.tail_logmass, stored_n, tail_N),
        kept_mass=float(np.exp(kept.logprobs_n, dtype=np.float64).sum()) / rows.num_rows,
    )  # fmt: skip
    return _record(header, payload)


def decode_block(header: Header, payload: memoryview, *, vocab_size: int, num_temperatures: int) -> StoredRows:
    """Decode the rows of a block whose checksum has been verified; arrays may share memory with `payload`.

    Raises:
        CorruptRecord: the payload does not match the header.
    """
    codec = CODEC_OF_CODE.get(header.codec)
    if header.kind is not Kind.BLOCK or codec is None:
        raise CorruptRecord(f"it is not a block of a known codec: kind {header.kind}, codec {header.codec}")
    N, M = header.num_rows, num_temperatures
    scalar = np.dtype(codec.scalar).newbyteorder("<")
    is_ragged = header.num_kept != N * header.top_k
    of_scalar = scalar.itemsize * N
    sizes = [of_scalar, of_scalar, of_scalar * M, 2 * N * is_ragged, -(-header.num_tokens // 8)]
    parts = []
    end = len(payload)
    for size in reversed(sizes):
        if size > end:
            raise CorruptRecord(f"its payload has {len(payload)} bytes, too few for {N} rows")
        parts.append(payload[end - size : end])
        end -= size
    bitmap, counts, tails, target, tail = parts
    offsets = np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little"))
    counts_N = np.frombuffer(counts, "<u2").astype(np.int64) if is_ragged else np.full(N, header.top_k, np.int64)
    if len(offsets) != N or counts_N.sum() != header.num_kept or (N and counts_N.min() < 1):
        raise CorruptRecord(f"its rows and counts are not the {N} rows and {header.num_kept} ids of its header")
    return StoredRows(
        positions_N=(offsets + header.first_token).astype(np.uint32),
        kept=codec.decode(payload[:end], counts_N, vocab_size=vocab_size),
        tail_logmass_N=np.frombuffer(tail, scalar),
        target_logprob_N=np.frombuffer(target, scalar),
        tail_logsumexps_NM=np.frombuffer(tails, scalar).reshape(N, M),
        by_rank=codec.by_rank,
    )


def encode_trajectory(key: bytes, blocks: Sequence[BlockOfTrajectory], *, num_tokens: int) -> bytes:
    """Encode the record that lists a trajectory's `blocks` in order."""
    payload = b"".join(_BLOCK_ENTRY.pack(block.index, block.num_rows, block.key) for block in blocks)
    num_rows = sum(block.num_rows for block in blocks)
    header = Header(
        kind=Kind.TRAJECTORY, codec=0, top_k=0, payload_bytes=len(payload), first_token=0, num_tokens=num_tokens,
        num_rows=num_rows, num_kept=0, key=key, checksum=xxhash.xxh3_128_digest(payload), kl_nats=0.0, kept_mass=0.0,
    )  # fmt: skip
    return _record(header, payload)


def decode_trajectory(header: Header, payload: memoryview) -> tuple[BlockOfTrajectory, ...]:
    """Decode the blocks of a trajectory whose checksum has been verified.

    Raises:
        CorruptRecord: the payload does not match the header.
    """
    if header.kind is not Kind.TRAJECTORY or len(payload) % _BLOCK_ENTRY.size:
        raise CorruptRecord(f"it is not a trajectory: kind {header.kind}, {len(payload)} bytes of payload")
    blocks = tuple(BlockOfTrajectory(*entry) for entry in _BLOCK_ENTRY.iter_unpack(payload))
    if sum(block.num_rows for block in blocks) != header.num_rows:
        raise CorruptRecord(f"its blocks do not have the {header.num_rows} rows of its header")
    return blocks


def check_record(content: memoryview) -> tuple[Header, memoryview]:
    """Return the header and payload of a whole record after checking every byte.

    Raises:
        CorruptRecord: the bytes are not a valid record; the message says how they differ.
    """
    header = Header.from_bytes(content)
    if len(content) != header.record_bytes:
        raise CorruptRecord(f"it has {len(content)} bytes, not the {header.record_bytes} given in its header")
    payload = header.payload(content)
    if xxhash.xxh3_128_digest(payload) != header.checksum:
        raise CorruptRecord("its checksum does not match")
    if any(content[HEADER_BYTES + header.payload_bytes :]):
        raise CorruptRecord("its padding is not zero")
    return header, payload


def _mean_kl(
    kept: KeptIds, tail_N: NDArray[np.floating], stored_n: NDArray[np.floating], stored_tail_N: NDArray[np.floating]
) -> float:
    """Return the mean over rows of KL(row || stored row) in nats, over kept ids and tail, both scaled to sum to 1."""
    starts = np.cumsum(kept.counts_N) - kept.counts_N
    p_n, p_N = np.exp(kept.logprobs_n, dtype=np.float64), np.exp(tail_N, dtype=np.float64)
    q_n, q_N = np.exp(stored_n, dtype=np.float64), np.exp(stored_tail_N, dtype=np.float64)
    total_p_N, total_q_N = (np.add.reduceat(kept_n, starts) + tail for kept_n, tail in ((p_n, p_N), (q_n, q_N)))
    tail_kl_N = p_N * np.subtract(tail_N, stored_tail_N, where=p_N > 0, out=np.zeros_like(p_N), dtype=np.float64)
    kl_N = np.add.reduceat(p_n * (kept.logprobs_n - stored_n.astype(np.float64)), starts) + tail_kl_N
    return float((kl_N / total_p_N + np.log(total_q_N / total_p_N)).mean())


def _record(header: Header, payload: bytes) -> bytes:
    return (header.to_bytes() + payload).ljust(header.record_bytes, b"\0")
