"""Convert between protobuf messages and the types used in the rest of the project.

Arrays are sent as packed little-endian bytes in row-major order, so encoding takes one copy and decoding none. The
arrays decoded from a message are read-only views of its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import xxhash
from blake3 import blake3
from numpy.typing import NDArray

from hyperagent.errors import CorruptRecord, InvalidRequest, ServiceError
from hyperagent.identity import DataIdentity, TeacherIdentity, TokenizerIdentity, canonical_json, require_same
from hyperagent.topk import TopKRows, concatenate
from hyperagent.wire import teacher_pb2 as pb
from hyperagent.wire.outcome import Outcome, PopulateOutcome

_U4 = np.dtype("<u4")
_F4 = np.dtype("<f4")

OPTIONS_ACCEPTED = ("options", "accepted")
"""Initial metadata with which PopulateCache accepts its options."""

_OUTCOMES = {
    Outcome.WRITTEN: pb.PopulateCacheResponse.OUTCOME_WRITTEN,
    Outcome.PRESENT: pb.PopulateCacheResponse.OUTCOME_PRESENT,
    Outcome.REFUSED: pb.PopulateCacheResponse.OUTCOME_REFUSED,
}
_OUTCOME_NAMES = {number: outcome for outcome, number in _OUTCOMES.items()}


def pack_u32(values: NDArray[np.integer], *, what: str) -> bytes:
    """Pack a one-dimensional array as uint32; `what` names it in error messages.

    Raises:
        InvalidRequest: the array is not one-dimensional or not of integers, or a value does not fit in 32 bits.
    """
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise InvalidRequest(f"{what} must be one row of integers, not {values.dtype} of shape {values.shape}")
    if values.size and (int(values.min()) < 0 or int(values.max()) > 0xFFFFFFFF):
        raise InvalidRequest(f"{what} must lie in [0, 2**32), not in [{values.min()}, {values.max()}]")
    return values.astype(_U4).tobytes()


def unpack_u32(packed: bytes, *, what: str) -> NDArray[np.uint32]:
    """Return the array [n] that `pack_u32` packed.

    Raises:
        InvalidRequest: the bytes are not a whole number of 32-bit values.
    """
    if len(packed) % _U4.itemsize:
        raise InvalidRequest(f"{what} must be packed uint32, but {len(packed)} bytes is not a multiple of 4")
    return np.frombuffer(packed, _U4).astype(np.uint32, copy=False)


class ChunkEncoder:
    """Splits the rows of one response into messages of about `max_bytes` each; the last one has the digest of all."""

    def __init__(self, *, top_k: int, num_temperatures: int, first_row: int = 0, max_bytes: int = 1 << 19) -> None:
        """Begin a response.

        Args:
            num_temperatures: number of temperatures in the teacher's identity.
            first_row: index of the response's first row among the request's positions.
        """
        self._rows_per_chunk = max(1, max_bytes // row_bytes(top_k, num_temperatures))
        self._next_row = first_row
        self._pending: list[TopKRows] = []
        self._num_pending = 0
        self._digest = blake3()

    def add(self, rows: TopKRows) -> Iterator[pb.ScoreTokensResponse]:
        """Add rows and yield the messages that are full; none of them is the last."""
        self._pending.append(rows)
        self._num_pending += rows.num_rows
        if self._num_pending <= self._rows_per_chunk:
            return
        joined = concatenate(self._pending)
        full = (self._num_pending - 1) // self._rows_per_chunk * self._rows_per_chunk
        for start in range(0, full, self._rows_per_chunk):
            yield self._chunk(joined.part(slice(start, start + self._rows_per_chunk)))
        self._pending = [joined.part(slice(full, None))]
        self._num_pending -= full

    def finish(self) -> pb.ScoreTokensResponse:
        """Return the last message, with the remaining rows and the digest.

        Raises:
            InvalidRequest: no row was added.
        """
        chunk = self._chunk(concatenate(self._pending))
        chunk.digest = self._digest.digest()
        return chunk

    def _chunk(self, rows: TopKRows) -> pb.ScoreTokensResponse:
        chunk = pb.ScoreTokensResponse(
            first_row=self._next_row,
            num_rows=rows.num_rows,
            top_k=rows.top_k,
            positions=rows.positions.astype(_U4, copy=False).tobytes(),
            ids=rows.ids.astype(_U4, copy=False).tobytes(),
            logprobs=rows.logprobs.astype(_F4, copy=False).tobytes(),
            tail_logmass=rows.tail_logmass.astype(_F4, copy=False).tobytes(),
            target_logprob=rows.target_logprob.astype(_F4, copy=False).tobytes(),
            tail_logsumexps=rows.tail_logsumexps.astype(_F4, copy=False).tobytes(),
            id_dtype=pb.DTYPE_UINT32,
            logprob_dtype=pb.DTYPE_FLOAT32,
        )
        chunk.checksum = _checksum(chunk)
        update_digest(self._digest, chunk)
        self._next_row += rows.num_rows
        return chunk


def row_bytes(top_k: int, num_temperatures: int) -> int:
    """Return the size of one row in bytes, on the wire and in memory."""
    return 8 * top_k + 12 + 4 * num_temperatures


def update_digest(digest: blake3, chunk: pb.ScoreTokensResponse) -> None:
    """Add one message's rows to a response's digest."""
    for packed in _arrays(chunk):
        digest.update(packed)


def chunk_to_rows(chunk: pb.ScoreTokensResponse) -> TopKRows:
    """Return the rows of one message.

    Raises:
        CorruptRecord: the checksum or a length does not match.
    """
    checksum = _checksum(chunk)
    if checksum != chunk.checksum:
        raise CorruptRecord(
            f"top-k rows from row {chunk.first_row} were damaged in transit: checksum {checksum:016x}, "
            f"expected {chunk.checksum:016x}; request them again"
        )
    if (chunk.id_dtype, chunk.logprob_dtype) != (pb.DTYPE_UINT32, pb.DTYPE_FLOAT32):
        raise CorruptRecord(
            f"top-k rows have dtypes {chunk.id_dtype} and {chunk.logprob_dtype}, which this version does not know; "
            "run the same version of hyperagent on both sides"
        )
    n, k = chunk.num_rows, chunk.top_k
    # Number of the teacher's temperatures other than 1.
    m = len(chunk.tail_logsumexps) // (_F4.itemsize * n) if n else 0
    return TopKRows(
        positions=_array(chunk.positions, _U4, (n,), "positions").astype(np.uint32, copy=False),
        ids=_array(chunk.ids, _U4, (n, k), "ids").astype(np.uint32, copy=False),
        logprobs=_array(chunk.logprobs, _F4, (n, k), "logprobs").astype(np.float32, copy=False),
        tail_logmass=_array(chunk.tail_logmass, _F4, (n,), "tail_logmass").astype(np.float32, copy=False),
        target_logprob=_array(chunk.target_logprob, _F4, (n,), "target_logprob").astype(np.float32, copy=False),
        tail_logsumexps=_array(chunk.tail_logsumexps, _F4, (n, m), "tail_logsumexps").astype(np.float32, copy=False),
    )


def _checksum(chunk: pb.ScoreTokensResponse) -> int:
    digest = xxhash.xxh3_64()
    for packed in _arrays(chunk):
        digest.update(packed)
    return digest.intdigest()


def _arrays(chunk: pb.ScoreTokensResponse) -> tuple[bytes, ...]:
    return (
        chunk.positions, chunk.ids, chunk.logprobs, chunk.tail_logmass, chunk.target_logprob, chunk.tail_logsumexps,
    )  # fmt: skip


def _array(packed: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], what: str) -> NDArray[Any]:
    expected = dtype.itemsize * int(np.prod(shape))
    if len(packed) != expected:
        raise CorruptRecord(
            f"top-k rows are damaged: {what} has {len(packed)} bytes, not {expected}; request them again"
        )
    return np.frombuffer(packed, dtype).reshape(shape)


def tokenizer_to_proto(identity: TokenizerIdentity) -> pb.TokenizerIdentity:
    return pb.TokenizerIdentity(tokenizer_sha256=identity.tokenizer_sha256, template_sha256=identity.template_sha256)


def tokenizer_from_proto(message: pb.TokenizerIdentity) -> TokenizerIdentity:
    return TokenizerIdentity(message.tokenizer_sha256, message.template_sha256)


def data_to_proto(identity: DataIdentity) -> pb.DataIdentity:
    return pb.DataIdentity(
        tokenizer=tokenizer_to_proto(identity.tokenizer),
        source=identity.source,
        settings=canonical_json(identity.settings).decode(),
        fingerprint=identity.fingerprint,
    )


def data_from_proto(message: pb.DataIdentity) -> DataIdentity:
    """Return the data identity of a client's message.

    Raises:
        InvalidRequest: the settings are not a JSON object.
        IdentityMismatch: the fingerprint does not match the fields.
    """
    try:
        settings = dict(json.loads(message.settings))
    except (ValueError, TypeError) as error:
        raise InvalidRequest(
            f"the data's settings are not a JSON object: {error}; send the identity stored in the tokens file"
        ) from error
    identity = DataIdentity(tokenizer_from_proto(message.tokenizer), message.source, settings)
    require_same(
        "the data's fingerprint",
        expected=identity.fingerprint,
        found=message.fingerprint,
        remedy="run the same version of hyperagent on both sides",
    )
    return identity


def teacher_to_proto(identity: TeacherIdentity) -> pb.TeacherIdentity:
    return pb.TeacherIdentity(
        model=identity.model,
        weights=identity.weights,
        dtype=identity.dtype,
        backend=identity.backend,
        tokenizer=pb.TokenizerIdentity(
            tokenizer_sha256=identity.tokenizer_sha256, template_sha256=identity.template_sha256
        ),
        vocab_size=identity.vocab_size,
        top_k=identity.top_k,
        temperatures=np.array(identity.temperatures, "<f8").tobytes(),
        fingerprint=identity.fingerprint,
    )


def teacher_from_proto(message: pb.TeacherIdentity) -> TeacherIdentity:
    """Return the teacher identity of a teacher's message.

    Raises:
        IdentityMismatch: the fingerprint does not match the fields, so the teacher has fields that this version lacks.
        ServiceError: the temperatures are not packed float64.
    """
    if len(message.temperatures) % 8:
        raise ServiceError(
            f"the teacher's temperatures have {len(message.temperatures)} bytes, which is not a multiple of 8; "
            "run the same version of hyperagent on both sides"
        )
    identity = TeacherIdentity(
        model=message.model,
        weights=message.weights,
        dtype=message.dtype,
        backend=message.backend,
        tokenizer_sha256=message.tokenizer.tokenizer_sha256,
        template_sha256=message.tokenizer.template_sha256,
        vocab_size=message.vocab_size,
        top_k=message.top_k,
        temperatures=tuple(np.frombuffer(message.temperatures, "<f8").tolist()),
    )
    require_same(
        "the teacher's fingerprint",
        expected=identity.fingerprint,
        found=message.fingerprint,
        remedy="run the same version of hyperagent on both sides",
    )
    return identity


def outcome_to_proto(outcome: PopulateOutcome) -> pb.PopulateCacheResponse:
    return pb.PopulateCacheResponse(
        trajectory_id=outcome.trajectory_id,
        outcome=_OUTCOMES[outcome.outcome],
        reason=outcome.reason,
        num_rows=outcome.num_rows,
        num_tokens=outcome.num_tokens,
        cache_key=outcome.cache_key,
        record_digest=bytes.fromhex(outcome.record_digest),
    )


def outcome_from_proto(message: pb.PopulateCacheResponse) -> PopulateOutcome:
    """Return the outcome of one PopulateCache message.

    Raises:
        ServiceError: this version does not know the outcome.
    """
    outcome = _OUTCOME_NAMES.get(message.outcome)
    if outcome is None:
        raise ServiceError(
            f"the teacher answered with outcome {message.outcome}, which this version does not know; "
            "run the same version of hyperagent on both sides"
        )
    return PopulateOutcome(
        trajectory_id=message.trajectory_id,
        outcome=outcome,
        num_rows=message.num_rows,
        num_tokens=message.num_tokens,
        cache_key=message.cache_key,
        record_digest=message.record_digest.hex(),
        reason=message.reason,
    )
