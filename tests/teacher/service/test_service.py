"""Test the service over a real channel with a tiny real model, and with a gated engine where timing matters."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
from data_identity import data_identity
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from teacher_service import (
    CANARY_ROWS,
    METADATA,
    NOT_SERVING,
    OTHER,
    SERVING,
    TOKEN,
    GatedEngine,
    Sequence,
    Serve,
    assert_same_rows,
    drained,
    health_of,
)

from hyperagent.cache.local import LocalCache
from hyperagent.errors import (
    Busy,
    ConfigError,
    IdentityMismatch,
    InvalidRequest,
    LimitExceeded,
    ServiceError,
)
from hyperagent.identity import TokenizerIdentity
from hyperagent.topk import concatenate
from hyperagent.wire import teacher_pb2 as pb
from hyperagent.wire import teacher_pb2_grpc
from hyperagent.wire.client import TeacherClient
from hyperagent.wire.outcome import Outcome
from hyperagent_teacher.config import TeacherSettings
from hyperagent_teacher.engines.base import ScoringEngine
from hyperagent_teacher.service.server import SERVICE, answer, bind

# Identity and access


async def test_it_says_who_it_is(serve: Serve, engine: ScoringEngine) -> None:
    async with serve() as client:
        facts = await client.get_teacher()
    assert (facts.identity, facts.max_tokens, facts.max_pending_requests) == (engine.identity, 2048, 2)


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer another"),), (("authorization", TOKEN),)])
async def test_a_call_without_the_token_is_refused(serve: Serve, metadata: tuple[tuple[str, str], ...]) -> None:
    async with serve() as client, grpc.aio.insecure_channel(client.address) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        calls = [
            stub.GetTeacher(pb.GetTeacherRequest(), metadata=metadata),
            stub.ScoreTokens(pb.ScoreTokensRequest(), metadata=metadata).read(),
            stub.PopulateCache(iter([]), metadata=metadata).read(),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await call
            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_client_with_another_token_learns_where_to_find_it(
    serve: Serve, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    async with serve() as client, TeacherClient(client.address, "another") as stranger:
        with pytest.raises(ConfigError, match="HYPERAGENT_TOKEN"):
            await stranger.get_teacher()
        with pytest.raises(ConfigError, match="HYPERAGENT_TOKEN"):
            await drained(stranger.populate([("t", *sequence)], data=data_identity(tokenizer)))


@pytest.mark.parametrize("enabled", [True, False])
async def test_reflection_is_there_when_asked_for(serve: Serve, enabled: bool) -> None:
    async with serve(reflection=enabled) as client, grpc.aio.insecure_channel(client.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=METADATA
        )
        if enabled:
            assert SERVICE in [service.name for service in (await call.read()).list_services_response.service]
        else:
            with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
                await call.read()


# Scoring


async def test_rows_arrive_as_the_engine_made_them(
    serve: Serve, engine: ScoringEngine, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    async with serve() as client:
        rows = concatenate(await drained(client.score_tokens(*sequence, top_k=5, tokenizer=tokenizer)))
    assert_same_rows(rows, concatenate(await drained(engine.score(*sequence, top_k=5))))


async def test_what_cannot_be_scored_is_refused_in_one_line(
    serve: Serve, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    token_ids, positions = sequence
    cases = [
        (token_ids, positions, 5, OTHER, IdentityMismatch, "tokenizer"),
        (np.zeros(2049, np.uint32), positions, 5, tokenizer, LimitExceeded, "2,049 tokens"),
        (token_ids, positions[::-1], 5, tokenizer, InvalidRequest, "increase strictly"),
        (token_ids, positions, 17, tokenizer, InvalidRequest, "top_k"),
    ]
    async with serve() as client:
        for ids, where, top_k, identity, error, words in cases:
            with pytest.raises(error, match=words) as refusal:
                await drained(client.score_tokens(ids, where, top_k=top_k, tokenizer=identity))
            assert "\n" not in str(refusal.value)


async def test_a_message_at_the_token_limit_fits(
    serve: Serve, gated: GatedEngine, tokenizer: TokenizerIdentity
) -> None:
    gated.max_tokens = 131_072
    async with serve(gated) as client:
        gated.forget_canary()
        for _ in range(131_071):
            gated.permits.release()
        token_ids = np.zeros(131_072, np.uint32)
        rows = client.score_tokens(token_ids, np.arange(1, 131_072, dtype=np.uint32), top_k=1, tokenizer=tokenizer)
        assert sum([part.num_rows for part in await drained(rows)]) == 131_071


async def test_a_defect_does_not_tell_its_text(
    serve: Serve, gated: GatedEngine, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    async with serve(gated) as client:
        gated.defect = RuntimeError("at 0xdeadbeef")
        gated.permits.release()
        with pytest.raises(ServiceError, match="unexpected error") as failure:
            await drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer))
    assert "0xdeadbeef" not in str(failure.value)


# Starting, waiting, stopping


async def test_it_serves_only_once_the_canary_is_scored(
    serve: Serve, engine: ScoringEngine, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    gated = GatedEngine(engine.identity, permits=0)
    async with serve(gated, wait=False) as client:
        await gated.started.wait()
        assert [await health_of(client), await health_of(client, SERVICE)] == [NOT_SERVING, NOT_SERVING]
        with pytest.raises(ServiceError, match="it is starting"):
            await drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer))
        with pytest.raises(ServiceError, match="health is NOT_SERVING"):
            await client.wait_until_serving(0.1)
        for _ in range(CANARY_ROWS):
            gated.permits.release()
        await client.wait_until_serving(30)
        assert [await health_of(client), await health_of(client, SERVICE)] == [SERVING, SERVING]


async def test_a_canary_that_cannot_be_scored_ends_the_service(
    settings: TeacherSettings, engine: ScoringEngine, cache: LocalCache
) -> None:
    server, _ = await bind(settings, token=TOKEN)
    broken = GatedEngine(engine.identity, permits=1, defect=ServiceError("the model's logits are not finite"))
    with pytest.raises(ServiceError, match="not finite"):
        await answer(server, broken, cache, settings, stop=asyncio.Event())


async def test_one_request_more_than_it_holds_is_refused(
    serve: Serve, gated: GatedEngine, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    async with serve(gated, max_pending_requests=1) as client:
        gated.forget_canary()
        first = asyncio.create_task(drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer)))
        await gated.started.wait()
        with pytest.raises(Busy, match="already holds 1 requests"):
            await drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer))
        with pytest.raises(Busy, match="already holds 1 requests"):
            await drained(client.populate([("t", *sequence)], data=data_identity(tokenizer)))
        for _ in range(2 * 20):
            gated.permits.release()
        assert concatenate(await first).num_rows == 20
        assert concatenate(await drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer))).num_rows == 20


@pytest.mark.parametrize("method", ["score", "populate"])
@pytest.mark.parametrize("leave", ["close", "deadline"])
async def test_a_call_that_nobody_waits_for_stops_the_engine(
    method: str,
    leave: str,
    serve: Serve,
    gated: GatedEngine,
    sequence: Sequence,
    tokenizer: TokenizerIdentity,
) -> None:
    timeout_s = 1.0 if leave == "deadline" else 600.0
    async with serve(gated) as client:
        gated.forget_canary()
        if method == "score":
            call = client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer, timeout_s=timeout_s)
        else:
            call = client.populate([("t", *sequence)], data=data_identity(tokenizer), timeout_s=timeout_s)
        reading = asyncio.create_task(drained(call))
        await gated.started.wait()
        if leave == "close":
            reading.cancel()
        with pytest.raises((asyncio.CancelledError, ServiceError)):
            await reading
        await asyncio.wait_for(gated.stopped.wait(), 30)


async def test_stopping_lets_a_request_end_and_takes_no_more(
    serve: Serve, gated: GatedEngine, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    stop = asyncio.Event()
    async with serve(gated, stop=stop, stop_grace_s=60.0) as client:
        gated.forget_canary()
        inside = asyncio.create_task(drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer)))
        await gated.started.wait()
        stop.set()
        while await health_of(client) != NOT_SERVING:
            await asyncio.sleep(0.01)
        with pytest.raises(ServiceError, match="it is shutting down"):
            await drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer))
        for _ in range(20):
            gated.permits.release()
        assert concatenate(await inside).num_rows == 20


async def test_stopping_ends_a_population_between_trajectories(
    serve: Serve, gated: GatedEngine, cache: LocalCache, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    token_ids, positions = sequence
    stop = asyncio.Event()
    async with serve(gated, stop=stop, stop_grace_s=60.0) as client:
        gated.forget_canary()
        outcomes = client.populate(
            [("one", token_ids, positions), ("two", token_ids, positions[1:])], data=data_identity(tokenizer)
        )
        first = asyncio.create_task(anext(outcomes))
        await gated.started.wait()
        stop.set()
        while await health_of(client) != NOT_SERVING:
            await asyncio.sleep(0.01)
        for _ in range(100):
            gated.permits.release()
        assert (await first).outcome is Outcome.WRITTEN
        with pytest.raises(ServiceError, match="it is shutting down"):
            await anext(outcomes)
    assert cache.is_intact(cache.key(token_ids, positions))
    assert not cache.contains(cache.key(token_ids, positions[1:]))


async def test_a_request_that_outlasts_the_grace_is_cut_off(
    serve: Serve, gated: GatedEngine, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    stop = asyncio.Event()
    async with serve(gated, stop=stop, stop_grace_s=0.0) as client:
        gated.forget_canary()
        inside = asyncio.create_task(drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer)))
        await gated.started.wait()
        stop.set()
        with pytest.raises(ServiceError):
            await inside
        await asyncio.wait_for(gated.stopped.wait(), 30)


# Addresses


async def test_a_port_in_use_is_one_line(serve: Serve, settings: TeacherSettings) -> None:
    async with serve() as client:
        port = int(client.address.rpartition(":")[2])
        with pytest.raises(ServiceError, match=f"cannot listen on 127.0.0.1:{port}: the port is taken") as refusal:
            await bind(settings.model_copy(update={"port": port}), token=TOKEN)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_an_address_that_others_can_reach_must_be_allowed(host: str, settings: TeacherSettings) -> None:
    with pytest.raises(ConfigError, match="--allow-remote"):
        await bind(settings.model_copy(update={"host": host}), token=TOKEN)


async def test_a_name_without_an_address_is_one_line(settings: TeacherSettings) -> None:
    with pytest.raises(ConfigError, match="there is no address") as refusal:
        await bind(settings.model_copy(update={"host": "no..name"}), token=TOKEN)
    assert "\n" not in str(refusal.value)


async def test_an_address_that_others_can_reach_can_be_allowed(serve: Serve) -> None:
    async with serve(host="0.0.0.0", allow_remote=True) as client:
        assert client.address.startswith("0.0.0.0:")
        await client.get_teacher()
