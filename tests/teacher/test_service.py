"""The service over a real channel: a tiny real model, and a gated engine where time matters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray

from hyperagent.auth import BEARER
from hyperagent.cache.store import TopKCache
from hyperagent.data.tokens import TRAIN, TokenisedTrajectory, write_tokens
from hyperagent.errors import (
    ConfigError,
    DataError,
    IdentityMismatch,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    ServiceError,
    StorageError,
)
from hyperagent.identity import TeacherIdentity, TokenizerIdentity
from hyperagent.topk import TopKRows, concatenate
from hyperagent.wire import codec, teacher_pb2_grpc
from hyperagent.wire import teacher_pb2 as pb
from hyperagent.wire.client import TeacherClient
from hyperagent.wire.outcome import Outcome, PopulateOutcome
from hyperagent_teacher.config import TeacherSettings
from hyperagent_teacher.engine import ScoringEngine
from hyperagent_teacher.server import SERVICE, answer, bind

TOKEN = "a-token"
METADATA = (("authorization", BEARER + TOKEN),)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
CANARY_ROWS = 7

Sequence = tuple[NDArray[np.uint32], NDArray[np.uint32]]
Serve = Callable[..., AbstractAsyncContextManager[TeacherClient]]


class GatedEngine:
    """Yields one uniform row per permit; a `ScoringEngine`."""

    def __init__(self, identity: TeacherIdentity, *, permits: int, defect: Exception | None = None) -> None:
        self.identity = identity
        self.max_tokens = 2048
        self.permits = asyncio.Semaphore(permits)
        self.started = asyncio.Event()
        self.stopped = asyncio.Event()
        self.defect = defect

    async def score(
        self, _token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, top_k: int
    ) -> AsyncGenerator[TopKRows, None]:
        self.started.set()
        uniform = np.float32(-np.log(self.identity.vocab_size))
        try:
            for place in range(len(positions)):
                await self.permits.acquire()
                if self.defect:
                    raise self.defect
                yield TopKRows(
                    positions[place : place + 1],
                    np.arange(top_k, dtype=np.uint32)[None],
                    np.full((1, top_k), uniform),
                    np.log1p(np.full(1, -top_k * np.exp(uniform), np.float32)),
                    np.full(1, uniform),
                )
        finally:
            self.stopped.set()

    def close(self) -> None:
        pass

    def forget_canary(self) -> None:
        self.started.clear()
        self.stopped.clear()


class FullDisk(TopKCache):
    """A cache whose disk is full."""

    def put(self, *_args: object, **_options: object) -> None:
        raise StorageError("could not write the record: the disk is full")


@pytest.fixture
def settings(tmp_path: Path) -> TeacherSettings:
    (tmp_path / "data").mkdir()
    return TeacherSettings(
        model=tmp_path, cache=tmp_path / "cache", data_dir=tmp_path / "data", port=0, max_pending_requests=2
    )


@pytest.fixture
def cache(settings: TeacherSettings, engine: ScoringEngine) -> TopKCache:
    return TopKCache.create_or_open(settings.cache, engine.identity)


@pytest.fixture
def serve(settings: TeacherSettings, engine: ScoringEngine, cache: TopKCache) -> Serve:
    """Runs a teacher and yields a client of it; by default the real engine, with the client waiting until it serves."""

    @asynccontextmanager
    async def run(
        engine: ScoringEngine = engine,
        cache: TopKCache = cache,
        *,
        stop: asyncio.Event | None = None,
        wait: bool = True,
        **changes: Any,
    ) -> AsyncIterator[TeacherClient]:
        changed = settings.model_copy(update={"stop_grace_s": 0.0, **changes})
        stop = stop or asyncio.Event()
        server, address = await bind(changed, token=TOKEN)
        answering = asyncio.create_task(answer(server, engine, cache, changed, stop=stop))
        async with TeacherClient(address, TOKEN) as client:
            if wait:
                await client.wait_until_serving(30)
            yield client
        stop.set()
        await answering

    return run


@pytest.fixture
def gated(engine: ScoringEngine) -> GatedEngine:
    """An engine that has just enough permits for the canary."""
    return GatedEngine(engine.identity, permits=CANARY_ROWS)


@pytest.fixture
def tokenizer(engine: ScoringEngine) -> TokenizerIdentity:
    return TokenizerIdentity(engine.identity.tokenizer_sha256, engine.identity.template_sha256)


OTHER = TokenizerIdentity("0" * 64, "1" * 64)


async def drained(generator: AsyncGenerator[Any, None]) -> list[Any]:
    async with aclosing(generator):
        return [item async for item in generator]


def assert_same_rows(left: TopKRows, right: TopKRows) -> None:
    for name in ("positions", "ids", "logprobs", "tail_logmass", "target_logprob"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


# Who it is, and who may ask


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


async def test_a_client_with_another_token_is_told_where_to_find_it(
    serve: Serve, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    async with serve() as client, TeacherClient(client.address, "another") as stranger:
        with pytest.raises(ConfigError, match="HYPERAGENT_TOKEN"):
            await stranger.get_teacher()
        with pytest.raises(ConfigError, match="HYPERAGENT_TOKEN"):
            await drained(stranger.populate([("t", *sequence)], tokenizer=tokenizer))


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
        (token_ids, positions, 17, tokenizer, LimitExceeded, "top_k"),
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
        gated.permits.release()
        token_ids = np.zeros(131_072, np.uint32)
        rows = client.score_tokens(token_ids, np.arange(1, 131_072, dtype=np.uint32), top_k=1, tokenizer=tokenizer)
        async with aclosing(rows):
            assert (await anext(rows)).num_rows == 1


async def test_a_defect_does_not_tell_its_text(
    serve: Serve, gated: GatedEngine, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    async with serve(gated) as client:
        gated.defect = RuntimeError("at 0xdeadbeef")
        gated.permits.release()
        with pytest.raises(ServiceError, match="unexpected error") as failure:
            await drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer))
    assert "0xdeadbeef" not in str(failure.value)


# The cache


async def test_populating_twice_computes_once(
    serve: Serve, engine: ScoringEngine, cache: TopKCache, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    token_ids, positions = sequence
    trajectories = [("one", token_ids, positions), ("two", token_ids, positions[:5])]
    async with serve() as client:
        first = await drained(client.populate(trajectories, tokenizer=tokenizer))
        second = await drained(client.populate(trajectories, tokenizer=tokenizer))
    keys = [cache.key(token_ids, positions), cache.key(token_ids, positions[:5])]
    assert first == [
        PopulateOutcome("one", Outcome.WRITTEN, num_rows=20, num_tokens=60, cache_key=keys[0]),
        PopulateOutcome("two", Outcome.WRITTEN, num_rows=5, num_tokens=60, cache_key=keys[1]),
    ]
    assert [outcome.outcome for outcome in second] == [Outcome.PRESENT, Outcome.PRESENT]
    assert [outcome.cache_key for outcome in second] == keys
    record = cache.get(keys[0])
    assert record.num_tokens == 60
    direct = concatenate(await drained(engine.score(token_ids, positions, top_k=16)))
    np.testing.assert_array_equal(record.rows.ids, direct.ids)
    np.testing.assert_allclose(record.rows.logprobs, direct.logprobs, atol=5e-3)  # may be stored in float16


async def test_a_bad_trajectory_is_refused_by_name_and_the_others_go_on(
    serve: Serve, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    token_ids, positions = sequence
    trajectories = [
        ("fine", token_ids, positions),
        ("long", np.zeros(2049, np.uint32), positions),
        ("unordered", token_ids, positions[::-1]),
        ("empty", token_ids, positions[:0]),
        ("fine too", token_ids, positions[1:]),
    ]
    async with serve() as client:
        outcomes = await drained(client.populate(trajectories, tokenizer=tokenizer))
    assert [(o.trajectory_id, o.outcome) for o in outcomes] == [
        ("fine", Outcome.WRITTEN),
        ("long", Outcome.REFUSED),
        ("unordered", Outcome.REFUSED),
        ("empty", Outcome.REFUSED),
        ("fine too", Outcome.WRITTEN),
    ]
    assert "2,049 tokens" in outcomes[1].reason
    assert not outcomes[1].cache_key


async def test_nothing_is_sent_that_the_teacher_does_not_wait_for(
    serve: Serve, gated: GatedEngine, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    token_ids, positions = sequence
    taken = []

    def trajectories() -> Iterator[tuple[str, NDArray[np.uint32], NDArray[np.uint32]]]:
        for number in range(1, 50):
            taken.append(number)
            yield str(number), np.roll(token_ids, number), positions

    async with serve(gated) as client:
        gated.forget_canary()
        outcomes = client.populate(trajectories(), tokenizer=tokenizer)
        first = asyncio.create_task(anext(outcomes))
        await gated.started.wait()
        for _ in range(10):  # calls that come and go meanwhile give a hasty sender its time
            await client.get_teacher()
        assert taken == [1, 2]  # the second is at hand, not sent
        for _ in range(20 * 49):
            gated.permits.release()
        assert (await first).outcome is Outcome.WRITTEN
        assert len(await drained(outcomes)) == 48


async def test_an_error_of_the_source_reaches_the_caller(
    serve: Serve, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    def trajectories() -> Iterator[tuple[str, NDArray[np.uint32], NDArray[np.uint32]]]:
        yield "one", *sequence
        raise DataError("the file ends early")

    async with serve() as client:
        with pytest.raises(DataError, match="the file ends early"):
            await drained(client.populate(trajectories(), tokenizer=tokenizer))
        await client.get_teacher()


async def test_another_tokenizer_is_refused_before_anything_is_scored(serve: Serve, sequence: Sequence) -> None:
    async with serve() as client:
        with pytest.raises(IdentityMismatch, match="tokenizer"):
            await drained(client.populate([("t", *sequence)], tokenizer=OTHER))


async def test_a_full_disk_stops_in_one_line(
    serve: Serve, engine: ScoringEngine, settings: TeacherSettings, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    full = FullDisk.create_or_open(settings.cache, engine.identity)
    async with serve(cache=full) as client:
        with pytest.raises(StorageError, match=r"^could not write the record: the disk is full$"):
            await drained(client.populate([("t", *sequence)], tokenizer=tokenizer))


@pytest.mark.parametrize(
    "items",
    [
        [],
        [pb.PopulateCacheRequest(trajectory=pb.TokenisedTrajectory(trajectory_id="t"))],
        ["options", pb.PopulateCacheRequest()],
        ["options", "options"],
        ["options", pb.PopulateCacheRequest(trajectory=pb.TokenisedTrajectory(token_ids=b"123"))],
    ],
)
async def test_a_stream_out_of_order_is_refused(items: list[Any], serve: Serve, tokenizer: TokenizerIdentity) -> None:
    options = pb.PopulateCacheRequest(options=pb.PopulateOptions(tokenizer=codec.tokenizer_to_proto(tokenizer)))
    requests = [options if item == "options" else item for item in items]
    async with serve() as client, grpc.aio.insecure_channel(client.address) as channel:
        call = teacher_pb2_grpc.TeacherServiceStub(channel).PopulateCache(iter(requests), metadata=METADATA)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call.read()
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def write_file(path: Path, sequence: Sequence, tokenizer: TokenizerIdentity) -> None:
    token_ids, positions = sequence
    rows = [
        TokenisedTrajectory(name, "repo", TRAIN, token_ids, positions[skip:], token_ids[:3])
        for skip, name in enumerate(("one", "two"))
    ]
    write_tokens(path, rows, tokenizer)


async def test_a_file_of_the_data_folder_is_populated(
    serve: Serve, settings: TeacherSettings, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    assert settings.data_dir
    write_file(settings.data_dir / "sub" / "tokens.parquet", sequence, tokenizer)
    async with serve() as client:
        outcomes = await drained(client.populate_file("sub/tokens.parquet", tokenizer=tokenizer))
    assert [(o.trajectory_id, o.outcome) for o in outcomes] == [("one", Outcome.WRITTEN), ("two", Outcome.WRITTEN)]


@pytest.mark.parametrize(
    "name", ["../outside.parquet", "sub/../../outside.parquet", "ABSOLUTE", "link.parquet", "a\0b"]
)
async def test_a_name_that_leads_out_of_the_data_folder_is_refused(
    name: str, serve: Serve, settings: TeacherSettings, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    assert settings.data_dir
    outside = settings.data_dir.parent / "outside.parquet"
    write_file(outside, sequence, tokenizer)
    (settings.data_dir / "link.parquet").symlink_to(outside)
    async with serve() as client:
        with pytest.raises(InvalidRequest, match="leads out of the data folder"):
            await drained(client.populate_file(str(outside) if name == "ABSOLUTE" else name, tokenizer=tokenizer))


async def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    serve: Serve, settings: TeacherSettings, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    assert settings.data_dir
    (settings.data_dir / "text.parquet").write_text("not\nparquet")
    write_file(settings.data_dir / "other.parquet", sequence, OTHER)
    cases: list[tuple[str, type[Exception], str]] = [
        ("absent.parquet", NotFound, "no tokens file 'absent.parquet'"),
        (".", NotFound, "no tokens file"),
        ("text.parquet", InvalidRequest, "not a Parquet file"),
        ("other.parquet", IdentityMismatch, "tokenizer of 'other.parquet'"),
    ]
    async with serve() as client:
        for name, error, words in cases:
            with pytest.raises(error, match=words) as refusal:
                await drained(client.populate_file(name, tokenizer=tokenizer))
            assert "\n" not in str(refusal.value)


async def test_without_a_data_folder_no_file_is_read(serve: Serve, tokenizer: TokenizerIdentity) -> None:
    async with serve(data_dir=None) as client:
        with pytest.raises(InvalidRequest, match="--data-dir"):
            await drained(client.populate_file("tokens.parquet", tokenizer=tokenizer))


# Starting, waiting, stopping


async def health_of(client: TeacherClient, service: str = "") -> int:
    async with grpc.aio.insecure_channel(client.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)


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
    settings: TeacherSettings, engine: ScoringEngine, cache: TopKCache
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
        with pytest.raises(LimitExceeded, match="already holds 1 requests"):
            await drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer))
        with pytest.raises(LimitExceeded, match="already holds 1 requests"):
            await drained(client.populate([("t", *sequence)], tokenizer=tokenizer))
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
            call = client.populate([("t", *sequence)], tokenizer=tokenizer, timeout_s=timeout_s)
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
    serve: Serve, gated: GatedEngine, cache: TopKCache, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    token_ids, positions = sequence
    stop = asyncio.Event()
    async with serve(gated, stop=stop, stop_grace_s=60.0) as client:
        gated.forget_canary()
        outcomes = client.populate(
            [("one", token_ids, positions), ("two", token_ids, positions[1:])], tokenizer=tokenizer
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
    assert cache.contains(cache.key(token_ids, positions))
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


# Where it listens


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
