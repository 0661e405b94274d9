"""Test the wire conversion, its table of errors and the generated stubs."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run

import grpc
import numpy as np
import pytest
from blake3 import blake3
from google.rpc import error_details_pb2, status_pb2

from hyperagent import errors
from hyperagent.errors import BeyondEnd, Busy, CorruptRecord, IdentityMismatch, InvalidRequest, NotServing, ServiceError
from hyperagent.identity import TeacherIdentity, TokenizerIdentity
from hyperagent.topk import TopKRows, concatenate
from hyperagent.wire import conversion
from hyperagent.wire import teacher_pb2 as pb
from hyperagent.wire.errors import reason_of, refusal, to_domain_error
from hyperagent.wire.outcome import Outcome, PopulateOutcome

ROOT = Path(__file__).parents[2]
ARRAYS = ("positions", "ids", "logprobs", "tail_logmass", "target_logprob", "tail_logsumexps")


def make_rows(n: int = 7, k: int = 3) -> TopKRows:
    generator = np.random.default_rng(0)
    return TopKRows(
        positions=np.arange(1, n + 1, dtype=np.uint32) * 5,
        ids=generator.integers(0, 2**32, (n, k), dtype=np.uint32),
        logprobs=generator.normal(size=(n, k)).astype(np.float32),
        tail_logmass=np.full(n, -np.inf, np.float32),
        target_logprob=generator.normal(size=n).astype(np.float32),
        tail_logsumexps=generator.normal(size=(n, 2)).astype(np.float32),
    )


def make_teacher(**changes: object) -> TeacherIdentity:
    fields = {
        "model": "tiny",
        "weights": "ab",
        "dtype": "float32",
        "backend": "transformers-5.0",
        "tokenizer_sha256": "cd",
        "template_sha256": "ef",
        "vocab_size": 300,
        "top_k": 16,
        "temperatures": (0.5, 2.0),
    }
    return TeacherIdentity(**{**fields, **changes})  # type: ignore[arg-type]


def encoded(rows: TopKRows, *, parts: int = 1, **options: int) -> list[pb.ScoreTokensResponse]:
    """Return the messages of `rows`, which the encoder gets in `parts` parts."""
    encoder = conversion.ChunkEncoder(top_k=rows.top_k, num_temperatures=2, **options)
    size = -(-rows.num_rows // parts)
    starts = range(0, rows.num_rows, size)
    sent = [chunk for start in starts for chunk in encoder.add(rows.part(slice(start, start + size)))]
    return [*sent, encoder.finish()]


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("max_bytes", [1, 100, 44 * 7, 1 << 20])
def test_rows_come_out_of_chunks_as_they_went_in(max_bytes: int, parts: int) -> None:
    rows = make_rows()
    sent = [chunk.SerializeToString() for chunk in encoded(rows, parts=parts, first_row=40, max_bytes=max_bytes)]
    chunks = [pb.ScoreTokensResponse.FromString(packed) for packed in sent]
    most = max(1, max_bytes // 44)
    assert [chunk.num_rows for chunk in chunks] == [most] * ((7 - 1) // most) + [(7 - 1) % most + 1]
    digest = blake3(b"".join(getattr(chunk, name) for chunk in chunks for name in ARRAYS)).digest()
    assert [chunk.digest for chunk in chunks] == [b""] * (len(chunks) - 1) + [digest]
    assert [chunk.first_row for chunk in chunks] == [
        40 + sum(c.num_rows for c in chunks[:i]) for i in range(len(chunks))
    ]
    back = concatenate([conversion.chunk_to_rows(chunk) for chunk in chunks])
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(back, name), getattr(rows, name))
        assert getattr(back, name).dtype == getattr(rows, name).dtype


def test_the_packed_bytes_are_little_endian_in_row_major_order() -> None:
    rows = TopKRows(
        positions=np.array([258], np.uint32),
        ids=np.array([[1, 2]], np.uint32),
        logprobs=np.array([[-1.0, -2.0]], np.float32),
        tail_logmass=np.array([-0.5], np.float32),
        target_logprob=np.array([-2.0], np.float32),
        tail_logsumexps=np.array([[-1.0, -4.0]], np.float32),
    )
    (chunk,) = encoded(rows)
    assert chunk.positions == bytes([2, 1, 0, 0])
    assert chunk.ids == bytes([1, 0, 0, 0, 2, 0, 0, 0])
    assert chunk.logprobs == bytes([0, 0, 0x80, 0xBF, 0, 0, 0, 0xC0])
    assert chunk.tail_logsumexps == bytes([0, 0, 0x80, 0xBF, 0, 0, 0x80, 0xC0])


@pytest.mark.parametrize("name", ARRAYS)
def test_every_changed_byte_is_noticed(name: str) -> None:
    (chunk,) = encoded(make_rows())
    packed = getattr(chunk, name)
    for place in range(len(packed)):
        setattr(chunk, name, packed[:place] + bytes([packed[place] ^ 1]) + packed[place + 1 :])
        with pytest.raises(CorruptRecord, match="damaged"):
            conversion.chunk_to_rows(chunk)


@pytest.mark.parametrize(("name", "by"), [("num_rows", 1), ("num_rows", -1), ("top_k", 1), ("top_k", -1)])
def test_a_shape_that_does_not_fit_its_bytes_is_noticed(name: str, by: int) -> None:
    (chunk,) = encoded(make_rows())
    setattr(chunk, name, getattr(chunk, name) + by)
    with pytest.raises(CorruptRecord, match="damaged"):
        conversion.chunk_to_rows(chunk)


def test_a_dtype_that_this_side_does_not_know_is_refused() -> None:
    (chunk,) = encoded(make_rows())
    chunk.logprob_dtype = 77
    with pytest.raises(CorruptRecord, match="dtypes 1 and 77"):
        conversion.chunk_to_rows(chunk)


def test_ids_are_packed_and_unpacked() -> None:
    ids = np.array([0, 1, 2**32 - 1], np.int64)
    back = conversion.unpack_u32(conversion.pack_u32(ids, what="ids"), what="ids")
    assert back.dtype == np.uint32
    np.testing.assert_array_equal(back, ids)


@pytest.mark.parametrize(
    "bad", [np.array([-1]), np.array([2**32]), np.array([1.0]), np.zeros((2, 2), np.uint32), np.array(3)]
)
def test_what_is_no_row_of_ids_is_not_packed(bad: np.ndarray) -> None:
    with pytest.raises(InvalidRequest, match=r"^ids must"):
        conversion.pack_u32(bad, what="ids")


def test_a_broken_packing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^ids must be packed uint32, but 5 bytes"):
        conversion.unpack_u32(b"12345", what="ids")


def test_identities_and_outcomes_travel() -> None:
    tokenizer = TokenizerIdentity("cd", "ef")
    assert conversion.tokenizer_from_proto(conversion.tokenizer_to_proto(tokenizer)) == tokenizer
    for teacher in (make_teacher(), make_teacher(temperatures=(0.7, 2.0))):
        assert conversion.teacher_from_proto(conversion.teacher_to_proto(teacher)) == teacher
    for outcome in Outcome:
        line = PopulateOutcome("t", outcome, num_rows=2, num_tokens=3, cache_key="k", reason="r")
        assert conversion.outcome_from_proto(conversion.outcome_to_proto(line)) == line


def test_a_teacher_that_states_more_than_this_side_knows_is_refused() -> None:
    message = conversion.teacher_to_proto(make_teacher())
    message.fingerprint = make_teacher(dtype="bfloat16").fingerprint
    with pytest.raises(IdentityMismatch, match="same version"):
        conversion.teacher_from_proto(message)


def test_temperatures_that_are_no_numbers_are_refused() -> None:
    message = conversion.teacher_to_proto(make_teacher(temperatures=(2.0,)))
    message.temperatures += b"\0"
    with pytest.raises(ServiceError, match="9 bytes, which is not a multiple of 8"):
        conversion.teacher_from_proto(message)


def test_an_outcome_that_this_side_does_not_know_is_refused() -> None:
    with pytest.raises(ServiceError, match="outcome 77"):
        conversion.outcome_from_proto(pb.PopulateCacheResponse(outcome=77))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sent", "code", "reason", "retry_after_s", "received"),
    [
        (Busy("m"), "RESOURCE_EXHAUSTED", "BUSY", 1, Busy),
        (NotServing("m"), "UNAVAILABLE", "NOT_SERVING", 2, NotServing),
        (errors.LimitExceeded("m"), "RESOURCE_EXHAUSTED", "TOO_LARGE", None, errors.LimitExceeded),
        (BeyondEnd("m"), "OUT_OF_RANGE", "BEYOND_END", None, BeyondEnd),
        (errors.InvalidRequest("m"), "INVALID_ARGUMENT", "INVALID_REQUEST", None, errors.InvalidRequest),
        (errors.DataError("m"), "INVALID_ARGUMENT", "INVALID_DATA", None, errors.InvalidRequest),
        (errors.RowRefused("t", "m"), "INVALID_ARGUMENT", "INVALID_DATA", None, errors.InvalidRequest),
        (errors.IdentityMismatch("m"), "FAILED_PRECONDITION", "IDENTITY_MISMATCH", None, errors.IdentityMismatch),
        (errors.NotFound("m"), "NOT_FOUND", "NOT_FOUND", None, errors.NotFound),
        (errors.CorruptRecord("m"), "DATA_LOSS", "DAMAGED", None, errors.CorruptRecord),
        (errors.StorageError("m"), "ABORTED", "STORAGE_REFUSED", None, errors.StorageError),
        (errors.ServiceError("m"), "INTERNAL", "FAILED", None, errors.ServiceError),
        (errors.ConfigError("m"), "INTERNAL", "FAILED", None, errors.ServiceError),
    ],
)
def test_an_error_crosses_the_wire(
    sent: errors.HyperagentError,
    code: str,
    reason: str,
    retry_after_s: int | None,
    received: type[errors.HyperagentError],
) -> None:
    status, details, trailers = refusal(sent)
    assert (status.name, details) == (code, str(sent))
    rich = status_pb2.Status.FromString(dict(trailers)["grpc-status-details-bin"])
    assert (rich.code, rich.message) == (status.value[0], details)
    kinds = [detail.TypeName() for detail in rich.details]
    assert kinds == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"][: 1 if retry_after_s is None else 2]
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        assert rich.details[1].Unpack(retry)
        assert retry.retry_delay.ToSeconds() == retry_after_s
    error = _rpc_error(status, f"{details}\n  more", trailers)
    assert reason_of(error) == reason
    back = to_domain_error(error, "here:1")
    assert type(back) is received
    assert "\n" not in str(back)
    assert "m more" in str(back)


@pytest.mark.parametrize(
    ("code", "received", "words"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServiceError, "hyperagent serve teacher"),
        (grpc.StatusCode.UNAUTHENTICATED, errors.ConfigError, "HYPERAGENT_TOKEN"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.ServiceError, "timeout"),
        (grpc.StatusCode.UNKNOWN, errors.ServiceError, "UNKNOWN"),
    ],
)
def test_grpcs_own_codes_have_a_meaning(code: grpc.StatusCode, received: type[Exception], words: str) -> None:
    back = to_domain_error(_rpc_error(code, "details"), "here:1")
    assert type(back) is received
    assert "here:1" in str(back)
    assert words in str(back)


def test_a_connection_that_breaks_while_sending_is_no_answer() -> None:
    # The exception that grpc.aio raises here instead of a status.
    back = to_domain_error(_rpc_error(grpc.StatusCode.INTERNAL, "Internal error from Core"), "here:1")
    assert type(back) is ServiceError
    assert "no teacher answers at here:1 (the connection broke off)" in str(back)


def _rpc_error(
    code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, bytes], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details=details)


def test_the_stubs_are_those_of_the_contract(tmp_path: Path) -> None:
    source = ROOT / "proto" / "hyperagent" / "teacher" / "v1"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-Ihyperagent/wire={source}"]
    command += [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    run([*command, str(source / "teacher.proto")], check=True, cwd=ROOT)
    made = sorted((tmp_path / "hyperagent" / "wire").iterdir())
    assert len(made) == 3
    for file in made:
        checked_in = ROOT / "shared" / "hyperagent" / "wire" / file.name
        assert checked_in.read_text() == file.read_text(), f"{file.name} is stale; see proto/README.md"
