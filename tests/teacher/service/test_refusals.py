"""Test every refusal over a real channel: its code, its reason, its one sentence and whether a retry helps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from data_identity import data_identity
from google.rpc import error_details_pb2, status_pb2
from teacher_service import METADATA, OTHER, GatedEngine, Sequence, Serve

from hyperagent.identity import TokenizerIdentity
from hyperagent.wire import conversion, teacher_pb2_grpc
from hyperagent.wire import teacher_pb2 as pb
from hyperagent_teacher.engines.base import ScoringEngine


def packed(values: Any) -> bytes:
    return np.asarray(values, "<u4").tobytes()


CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "another tokenizer": ({"tokenizer": conversion.tokenizer_to_proto(OTHER)}, "FAILED_PRECONDITION", "IDENTITY_MISMATCH", "the tokenizer does not match"),
    "ids outside the vocabulary": ({"token_ids": packed([1, 2, 511])}, "INVALID_ARGUMENT", "INVALID_REQUEST", "outside the vocabulary of 284"),
    "k = 0": ({"top_k": 0}, "INVALID_ARGUMENT", "INVALID_REQUEST", "top_k must lie in"),
    "k above the limit": ({"top_k": 17}, "INVALID_ARGUMENT", "INVALID_REQUEST", "top_k must lie in"),
    "nothing at all": ({"token_ids": b"", "positions": b""}, "INVALID_ARGUMENT", "INVALID_REQUEST", "no token"),
    "no position": ({"positions": b""}, "INVALID_ARGUMENT", "INVALID_REQUEST", "no position"),
    "positions out of order": ({"positions": packed([2, 1])}, "INVALID_ARGUMENT", "INVALID_REQUEST", "increase strictly"),
    "half an id": ({"token_ids": b"123"}, "INVALID_ARGUMENT", "INVALID_REQUEST", "multiple of 4"),
    "a million tokens": ({"token_ids": packed(np.zeros(1_000_000))}, "RESOURCE_EXHAUSTED", "TOO_LARGE", "the sequence has 1,000,000 tokens"),
    "resumed after the end": ({"first_row": 2}, "OUT_OF_RANGE", "BEYOND_END", "no row 2 among 2"),
}  # fmt: skip


@pytest.fixture
def request_fields(tokenizer: TokenizerIdentity) -> dict[str, Any]:
    return {
        "tokenizer": conversion.tokenizer_to_proto(tokenizer),
        "token_ids": packed([1, 2, 3]),
        "positions": packed([1, 2]),
        "top_k": 4,
    }


async def refusal_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        async for _ in call:
            pass
    return refusal.value


def details_of(error: grpc.aio.AioRpcError) -> tuple[str, bool]:
    """Return the reason, and whether the error says when to try again."""
    rich = status_pb2.Status.FromString(dict(list(error.trailing_metadata()))["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert rich.details[0].Unpack(info)
    assert (rich.code, rich.message, info.domain) == (error.code().value[0], error.details(), "hyperagent")
    return info.reason, any(detail.Unpack(retry) for detail in rich.details)


@pytest.mark.parametrize("case", CASES)
async def test_a_request_that_cannot_be_answered(case: str, serve: Serve, request_fields: dict[str, Any]) -> None:
    changes, code, reason, words = CASES[case]
    async with serve() as client, grpc.aio.insecure_channel(client.address) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        request = pb.ScoreTokensRequest(**{**request_fields, **changes})
        error = await refusal_of(stub.ScoreTokens(request, timeout=30, metadata=METADATA))
        assert (error.code().name, details_of(error)) == (code, (reason, False))
        assert words in error.details()
        assert "\n" not in error.details()
        assert (await client.get_teacher()).max_tokens == 2048


async def test_a_call_without_a_deadline(
    serve: Serve, request_fields: dict[str, Any], tokenizer: TokenizerIdentity
) -> None:
    async def options() -> AsyncIterator[pb.PopulateCacheRequest]:
        data = conversion.data_to_proto(data_identity(tokenizer))
        yield pb.PopulateCacheRequest(options=pb.PopulateOptions(data=data))

    async with serve() as client, grpc.aio.insecure_channel(client.address) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        for call in (
            stub.ScoreTokens(pb.ScoreTokensRequest(**request_fields), metadata=METADATA),
            stub.PopulateCache(options(), metadata=METADATA),
        ):
            error = await refusal_of(call)
            assert (error.code().name, details_of(error)) == ("INVALID_ARGUMENT", ("INVALID_REQUEST", False))
            assert "no deadline" in error.details()


async def test_bad_auth(serve: Serve, request_fields: dict[str, Any]) -> None:
    async with serve() as client, grpc.aio.insecure_channel(client.address) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        call = stub.ScoreTokens(pb.ScoreTokensRequest(**request_fields), timeout=30, metadata=())
        error = await refusal_of(call)
    assert (error.code().name, details_of(error)) == ("UNAUTHENTICATED", ("UNAUTHENTICATED", False))


async def test_a_full_teacher_says_when_to_come_back(
    serve: Serve, gated: GatedEngine, request_fields: dict[str, Any]
) -> None:
    async with serve(gated, max_pending_requests=1) as client, grpc.aio.insecure_channel(client.address) as channel:
        gated.forget_canary()
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        request = pb.ScoreTokensRequest(**request_fields)
        first = stub.ScoreTokens(request, timeout=30, metadata=METADATA)
        await gated.started.wait()
        error = await refusal_of(stub.ScoreTokens(request, timeout=30, metadata=METADATA))
        assert (error.code().name, details_of(error)) == ("RESOURCE_EXHAUSTED", ("BUSY", True))
        first.cancel()


async def test_rows_that_do_not_fit_in_memory_are_refused_before_anything_is_computed(
    serve: Serve, engine: ScoringEngine, gated: GatedEngine, tokenizer: TokenizerIdentity
) -> None:
    num_tokens = 2048
    request = pb.ScoreTokensRequest(
        tokenizer=conversion.tokenizer_to_proto(tokenizer),
        token_ids=packed(np.zeros(num_tokens)),
        positions=packed(np.arange(1, num_tokens)),
        top_k=16,
    )
    gated.max_tokens = 1 << 20
    big = pb.ScoreTokensRequest()
    big.CopyFrom(request)
    big.token_ids, big.positions = packed(np.zeros(10_000)), packed(np.arange(1, 10_000))
    async with (
        serve(gated, row_memory_mib=1) as client,
        grpc.aio.insecure_channel(client.address) as channel,
    ):
        gated.forget_canary()
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        error = await refusal_of(stub.ScoreTokens(big, timeout=30, metadata=METADATA))
        assert (error.code().name, details_of(error)) == ("RESOURCE_EXHAUSTED", ("TOO_LARGE", False))
        assert "--row-memory-mib" in error.details()
        assert not gated.started.is_set()


async def test_a_stream_goes_on_at_the_row_asked_for_with_the_same_bytes(
    serve: Serve,
    engine: ScoringEngine,
    sequence: Sequence,
    tokenizer: TokenizerIdentity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token_ids, positions = sequence
    async with serve() as client, grpc.aio.insecure_channel(client.address) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)

        async def rows_from(first_row: int) -> Any:
            request = pb.ScoreTokensRequest(
                tokenizer=conversion.tokenizer_to_proto(tokenizer),
                token_ids=packed(token_ids),
                positions=packed(positions),
                top_k=4,
                first_row=first_row,
            )
            (chunk,) = [c async for c in stub.ScoreTokens(request, timeout=30, metadata=METADATA)]
            return chunk

        monkeypatch.setattr(engine, "rows_per_step", 8)
        whole = await rows_from(0)
        for first_row in (0, 1, 8, 13, 19):
            chunk = await rows_from(first_row)
            assert (chunk.first_row, chunk.num_rows) == (first_row, 20 - first_row)
            assert chunk.ids == whole.ids[first_row * 16 :]
            assert chunk.logprobs == whole.logprobs[first_row * 16 :]
