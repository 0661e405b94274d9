"""Test PopulateCache over a real channel: what it caches, what it refuses and what stops it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import Result
from data_identity import data_identity
from numpy.typing import NDArray
from teacher_service import (
    METADATA,
    OTHER,
    TOKEN,
    FullDisk,
    GatedEngine,
    Sequence,
    Serve,
    drained,
)
from typer.testing import CliRunner

from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.stats import cache_digest
from hyperagent.cache.maintenance.verify import verify
from hyperagent.cli.cache import app
from hyperagent.data.files.tokens_file import TRAIN, TokenizedTrajectory, write_tokens
from hyperagent.errors import (
    ConfigError,
    DataError,
    IdentityMismatch,
    InvalidRequest,
    NotFound,
    StorageError,
)
from hyperagent.identity import TokenizerIdentity
from hyperagent.topk import concatenate
from hyperagent.wire import conversion, teacher_pb2_grpc
from hyperagent.wire import teacher_pb2 as pb
from hyperagent.wire.outcome import Outcome, PopulateOutcome
from hyperagent_teacher.config import TeacherSettings
from hyperagent_teacher.engines.base import ScoringEngine


async def test_populating_twice_computes_once(
    serve: Serve, engine: ScoringEngine, cache: LocalCache, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    token_ids, positions = sequence
    trajectories = [("one", token_ids, positions), ("two", token_ids, positions[:5])]
    async with serve() as client:
        first = await drained(client.populate(trajectories, data=data_identity(tokenizer)))
        second = await drained(client.populate(trajectories, data=data_identity(tokenizer)))
    keys = [cache.key(token_ids, positions), cache.key(token_ids, positions[:5])]
    digests = [cache.stored_digest(key) for key in keys]
    assert first == [
        PopulateOutcome("one", Outcome.WRITTEN, 20, 60, cache_key=keys[0], record_digest=digests[0]),
        PopulateOutcome("two", Outcome.WRITTEN, 5, 60, cache_key=keys[1], record_digest=digests[1]),
    ]
    assert [outcome.outcome for outcome in second] == [Outcome.PRESENT, Outcome.PRESENT]
    assert [(outcome.cache_key, outcome.record_digest) for outcome in second] == list(zip(keys, digests, strict=True))
    assert verify(cache).digest == cache_digest(dict(zip(keys, digests, strict=True)))
    cache.require_data(data_identity(tokenizer))
    record = cache.get(keys[0])
    assert record.num_tokens == 60
    direct = concatenate(await drained(engine.score(token_ids, positions, top_k=16)))
    np.testing.assert_array_equal(np.sort(record.rows.ids), np.sort(direct.ids))
    # Rows are stored in 256 steps, so ids of nearly equal probability may have swapped places.
    np.testing.assert_allclose(record.rows.logprobs, direct.logprobs, atol=5e-2)


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
        outcomes = await drained(client.populate(trajectories, data=data_identity(tokenizer)))
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
        outcomes = client.populate(trajectories(), data=data_identity(tokenizer))
        first = asyncio.create_task(anext(outcomes))
        await gated.started.wait()
        for _ in range(10):  # these calls give a sender that does not wait time to send
            await client.get_teacher()
        assert taken == [1, 2]  # the second trajectory has been read but not sent
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
            await drained(client.populate(trajectories(), data=data_identity(tokenizer)))
        await client.get_teacher()


async def test_another_tokenizer_is_refused_before_anything_is_scored(serve: Serve, sequence: Sequence) -> None:
    async with serve() as client:
        with pytest.raises(IdentityMismatch, match="tokenizer"):
            await drained(client.populate([("t", *sequence)], data=data_identity(OTHER)))


async def test_a_full_disk_stops_in_one_line(
    serve: Serve, engine: ScoringEngine, settings: TeacherSettings, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    full = FullDisk.create_or_open(settings.cache, engine.identity)
    async with serve(cache=full) as client:
        with pytest.raises(StorageError, match=r"^could not write the record: the disk is full$"):
            await drained(client.populate([("t", *sequence)], data=data_identity(tokenizer)))


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
    options = pb.PopulateCacheRequest(
        options=pb.PopulateOptions(data=conversion.data_to_proto(data_identity(tokenizer)))
    )

    async def requests() -> AsyncIterator[pb.PopulateCacheRequest]:
        # Done as in TeacherClient: grpc.aio loses the status of a call that ends while a message is being sent.
        for item in items:
            yield options if item == "options" else item
            await call.initial_metadata()
        if items:
            await call.code()

    async with serve() as client, grpc.aio.insecure_channel(client.address) as channel:
        call = teacher_pb2_grpc.TeacherServiceStub(channel).PopulateCache(requests(), metadata=METADATA)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call.read()
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def write_file(path: Path, sequence: Sequence, tokenizer: TokenizerIdentity) -> None:
    token_ids, positions = sequence
    with write_tokens(path, data_identity(tokenizer)) as writer:
        for name, kept in (("one", positions), ("two", positions[1:])):
            writer.write(TokenizedTrajectory(name, "repo", TRAIN, token_ids, kept, token_ids[:3], token_ids, kept))


async def test_a_file_of_the_data_folder_is_populated(
    serve: Serve, settings: TeacherSettings, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    assert settings.data_dir
    write_file(settings.data_dir / "sub" / "tokens.parquet", sequence, tokenizer)
    async with serve() as client:
        outcomes = await drained(client.populate_file("sub/tokens.parquet", data=data_identity(tokenizer)))
    assert [(o.trajectory_id, o.outcome) for o in outcomes] == [("one", Outcome.WRITTEN), ("two", Outcome.WRITTEN)]


async def test_the_command_has_the_teacher_read_its_own_copy_of_the_file(
    serve: Serve,
    settings: TeacherSettings,
    cache: LocalCache,
    sequence: Sequence,
    tokenizer: TokenizerIdentity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYPERAGENT_TOKEN", TOKEN)
    assert settings.data_dir
    write_file(settings.data_dir / "sub" / "copy.parquet", sequence, tokenizer)
    write_file(tmp_path / "tokens.parquet", sequence, tokenizer)

    async def command(*options: str) -> Result:
        arguments = ["populate", str(tmp_path / "tokens.parquet"), "--json", "--file-on-teacher", *options]
        return await asyncio.to_thread(CliRunner().invoke, app, arguments)

    async with serve() as client:
        first, second = [await command("sub/copy.parquet", "--teacher", client.address) for _ in range(2)]
        absent = await command("tokens.parquet", "--teacher", client.address)
        two = await command("sub/copy.parquet", "--teacher", client.address, "--teacher", client.address)
    reports = [json.loads(result.stdout) for result in (first, second)]
    assert [(report["written"], report["present"]) for report in reports] == [(2, 0), (0, 2)]
    assert {report["digest"] for report in reports} == {verify(cache).digest}
    assert {report["supervised_tokens"] for report in reports} == {39}
    assert not (tmp_path / "tokens.parquet.queue.sqlite").exists()
    assert isinstance(absent.exception, NotFound)
    assert isinstance(two.exception, ConfigError)


async def test_a_file_of_other_data_is_refused(
    serve: Serve, settings: TeacherSettings, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    assert settings.data_dir
    write_file(settings.data_dir / "tokens.parquet", sequence, tokenizer)
    async with serve() as client:
        with pytest.raises(IdentityMismatch, match=r"the data of 'tokens\.parquet' does not match: .*source=ffff"):
            await drained(client.populate_file("tokens.parquet", data=data_identity(tokenizer, source="f" * 64)))


async def test_an_identity_whose_fingerprint_is_not_its_own_is_refused(
    serve: Serve, tokenizer: TokenizerIdentity
) -> None:
    for change in ({"fingerprint": "0" * 64}, {"settings": "[1"}, {"settings": "{}"}):
        data = conversion.data_to_proto(data_identity(tokenizer))
        for name, value in change.items():
            setattr(data, name, value)
        requests = [pb.PopulateCacheRequest(options=pb.PopulateOptions(data=data))]
        async with serve() as client, grpc.aio.insecure_channel(client.address) as channel:
            call = teacher_pb2_grpc.TeacherServiceStub(channel).PopulateCache(iter(requests), metadata=METADATA)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await call.read()
        assert refusal.value.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)


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
        with pytest.raises(InvalidRequest, match="is outside the data folder"):
            await drained(
                client.populate_file(str(outside) if name == "ABSOLUTE" else name, data=data_identity(tokenizer))
            )


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
        ("other.parquet", IdentityMismatch, "the data of 'other.parquet'"),
    ]
    async with serve() as client:
        for name, error, words in cases:
            with pytest.raises(error, match=words) as refusal:
                await drained(client.populate_file(name, data=data_identity(tokenizer)))
            assert "\n" not in str(refusal.value)


async def test_without_a_data_folder_no_file_is_read(serve: Serve, tokenizer: TokenizerIdentity) -> None:
    async with serve(data_dir=None) as client:
        with pytest.raises(InvalidRequest, match="--data-dir"):
            await drained(client.populate_file("tokens.parquet", data=data_identity(tokenizer)))
