"""Test the service with readers that do not read, callers that leave, a hanging engine and broken streams."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import random
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from teacher_process import START_TIMEOUT_S, free_port, teacher
from teacher_service import METADATA, NOT_SERVING, SERVING, TOKEN, GatedEngine, Sequence, Serve, drained, health_of

from hyperagent.cache.local import LocalCache
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError, HyperagentError, NotServing, ServiceError
from hyperagent.identity import TokenizerIdentity
from hyperagent.topk import TopKRows, concatenate
from hyperagent.wire import client as wire_client
from hyperagent.wire import conversion, teacher_pb2_grpc
from hyperagent.wire import teacher_pb2 as pb
from hyperagent.wire.client import TeacherClient
from hyperagent_teacher.config import TeacherSettings
from hyperagent_teacher.engines.base import ScoringEngine
from hyperagent_teacher.engines.transformers import TransformersEngine
from hyperagent_teacher.service.server import answer, bind

# Slow readers


@pytest.mark.slow
async def test_32_readers_who_do_not_read_cost_little_memory(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = model_folders["qwen3_moe"]
    tokenizer = ChatTokenizer(folder)
    token_ids, positions = np.zeros(4096, np.uint32), np.arange(1, 4096, dtype=np.uint32)
    request = pb.ScoreTokensRequest(
        tokenizer=conversion.tokenizer_to_proto(tokenizer.identity),
        token_ids=token_ids.tobytes(),
        positions=positions.tobytes(),
        top_k=256,
    )
    settings = {"HYPERAGENT_TEACHER_TOP_K": "256", "HYPERAGENT_TEACHER_MAX_PENDING_REQUESTS": "33"}
    # glibc keeps freed memory, in amounts that vary from run to run (30 to 90 MiB were seen). The test is about what
    # the server holds, so large blocks go back to the system as soon as they are freed (mallopt(3), M_MMAP_THRESHOLD).
    settings |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    port = free_port()
    with teacher(folder, tmp_path / "cache", port, **settings) as process:
        server = psutil.Process(process.pid)
        async with (
            TeacherClient(f"127.0.0.1:{port}", TOKEN) as client,
            grpc.aio.insecure_channel(client.address) as channel,
        ):
            await client.wait_until_serving(START_TIMEOUT_S)
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            for _ in range(4):  # not part of the test: the cost of a single reader
                assert await rows_of(stub.ScoreTokens(request, timeout=120, metadata=METADATA)) == 4095
            before = server.memory_info().rss
            calls = [stub.ScoreTokens(request, timeout=250, metadata=METADATA) for _ in range(32)]
            firsts = [await call.read() for call in calls]
            # The engine takes requests in order, so once it has answered another one it has finished these.
            last = client.score_tokens(token_ids[:8], positions[:7], top_k=1, tokenizer=tokenizer.identity)
            assert concatenate(await drained(last)).num_rows == 7
            grown = server.memory_info().rss - before
            unread = 32 * 4095 * conversion.row_bytes(256, 0)
            assert unread > 250 << 20
            assert grown <= 64 << 20, f"{grown / 2**20:.0f} MiB of {unread / 2**20:.0f} MiB"
            assert [first.num_rows + await rows_of(call) for first, call in zip(firsts, calls, strict=True)] == [
                4095
            ] * 32


async def rows_of(call: Any) -> int:
    num_rows = 0
    while (chunk := await call.read()) is not grpc.aio.EOF:
        num_rows += chunk.num_rows
    return num_rows


# Callers that leave


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.slow)])
async def test_cancels_and_expired_deadlines_leave_nothing_behind(
    rounds: int, serve: Serve, engine: TransformersEngine, tokenizer: TokenizerIdentity
) -> None:
    generator = np.random.default_rng(0)
    chance = random.Random(0)
    token_ids = generator.integers(0, engine.identity.vocab_size, 400).astype(np.uint32)
    positions = np.arange(1, 400, dtype=np.uint32)
    async with serve(max_pending_requests=16) as client:

        async def score(timeout_s: float) -> None:
            with suppress(HyperagentError):
                await drained(
                    client.score_tokens(token_ids, positions, top_k=16, tokenizer=tokenizer, timeout_s=timeout_s)
                )

        await score(30.0)
        await settled()
        tasks, descriptors = len(asyncio.all_tasks()), open_descriptors()
        for _ in range(rounds):
            calls = []
            for place in range(10):
                expires = place % 2 == 0
                calls.append(asyncio.create_task(score(chance.uniform(0.001, 0.05) if expires else 30.0)))
            await asyncio.sleep(chance.uniform(0, 0.05))
            for call in calls[1::2]:
                call.cancel()
            await asyncio.wait(calls)
        await settled()
        async with asyncio.timeout(30):
            while len(asyncio.all_tasks()) > tasks or engine._turn.locked() or open_descriptors() > descriptors:
                await asyncio.sleep(0.1)
        rows = await drained(client.score_tokens(token_ids, positions, top_k=16, tokenizer=tokenizer))
        assert concatenate(rows).num_rows == 399


async def settled() -> None:
    await asyncio.sleep(0.3)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# An engine that hangs


async def test_an_engine_that_hangs_is_not_serving_and_serves_again_when_it_moves(
    serve: Serve, gated: GatedEngine, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    async with serve(gated, engine_timeout_s=0.4, engine_restart_s=60.0) as client:
        reading = asyncio.create_task(drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer)))
        async with asyncio.timeout(10):
            while await health_of(client) != NOT_SERVING:
                await asyncio.sleep(0.02)
        with pytest.raises(NotServing, match="its engine does not respond"):
            await drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer))
        for _ in range(10_000):
            gated.permits.release()
        assert concatenate(await reading).num_rows == 20
        async with asyncio.timeout(10):
            while await health_of(client) != SERVING:
                await asyncio.sleep(0.02)
        assert gated.restarts == 0
        assert concatenate(await drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer))).num_rows == 20


async def test_an_engine_that_stays_so_is_started_again(
    serve: Serve, gated: GatedEngine, sequence: Sequence, tokenizer: TokenizerIdentity
) -> None:
    async with serve(gated, engine_timeout_s=0.2, engine_restart_s=0.2) as client:
        async with asyncio.timeout(20):
            while not gated.restarts:
                await asyncio.sleep(0.02)
            await client.wait_until_serving(10)
        assert concatenate(await drained(client.score_tokens(*sequence, top_k=1, tokenizer=tokenizer))).num_rows == 20


async def test_an_engine_that_cannot_be_started_again_ends_the_service(
    settings: TeacherSettings, gated: GatedEngine, cache: LocalCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        raise ServiceError("the model hangs, and only a new process helps")

    monkeypatch.setattr(gated, "restart", refuse)
    changed = settings.model_copy(update={"engine_timeout_s": 0.2, "engine_restart_s": 0.2})
    server, _ = await bind(changed, token=TOKEN)
    with pytest.raises(ServiceError, match="only a new process helps"):
        await asyncio.wait_for(answer(server, gated, cache, changed, stop=asyncio.Event()), 30)


# A stream that breaks


async def test_a_stream_that_breaks_is_taken_up_where_it_broke(
    serve: Serve,
    engine: ScoringEngine,
    sequence: Sequence,
    tokenizer: TokenizerIdentity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_encoder = conversion.ChunkEncoder

    def small_chunks(*, top_k: int, num_temperatures: int, first_row: int, max_bytes: int) -> conversion.ChunkEncoder:
        assert max_bytes == 1 << 19
        three_rows = 3 * conversion.row_bytes(top_k, num_temperatures)
        return real_encoder(top_k=top_k, num_temperatures=num_temperatures, first_row=first_row, max_bytes=three_rows)

    monkeypatch.setattr(conversion, "ChunkEncoder", small_chunks)
    asked: list[int] = []
    real = conversion.chunk_to_rows

    def break_twice(chunk: pb.ScoreTokensResponse) -> TopKRows:
        if chunk.first_row in (6, 12) and chunk.first_row not in asked:
            asked.append(chunk.first_row)
            chunk.ids = bytes(len(chunk.ids))  # damaged on the way
        return real(chunk)

    monkeypatch.setattr(wire_client.conversion, "chunk_to_rows", break_twice)
    async with serve() as client:
        rows = concatenate(await drained(client.score_tokens(*sequence, top_k=16, tokenizer=tokenizer)))
    assert asked == [6, 12]
    direct = concatenate(await drained(engine.score(*sequence, top_k=16)))
    np.testing.assert_array_equal(rows.ids, direct.ids)
    np.testing.assert_array_equal(rows.logprobs, direct.logprobs)


async def test_a_stream_that_never_gets_on_is_given_up(
    serve: Serve, sequence: Sequence, tokenizer: TokenizerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(_chunk: pb.ScoreTokensResponse) -> TopKRows:
        raise ServiceError("broken off")

    monkeypatch.setattr(wire_client.conversion, "chunk_to_rows", damaged)
    async with serve() as client:
        with pytest.raises(ServiceError, match="broken off"):
            await drained(client.score_tokens(*sequence, top_k=16, tokenizer=tokenizer))


async def test_rows_with_another_digest_are_refused(
    serve: Serve, sequence: Sequence, tokenizer: TokenizerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_client, "blake3", lambda: blake3(b"something else"))
    async with serve() as client, aclosing(client.score_tokens(*sequence, top_k=4, tokenizer=tokenizer)) as rows:
        with pytest.raises(HyperagentError, match="do not match the digest"):
            async for _ in rows:
                pass


# TLS


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """Write a self-signed certificate for the loopback address and its key, and return both paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "teacher")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(certificate.public_bytes(pem))
    files[1].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return files


async def test_tls_encrypts_and_is_asked_for(serve: Serve, engine: ScoringEngine, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    async with serve(tls_certificate=certificate, tls_key=key, wait=False) as plain:
        async with TeacherClient(plain.address, TOKEN, tls_ca=certificate) as client:
            await client.wait_until_serving(30)
            assert (await client.get_teacher()).identity == engine.identity
        with pytest.raises(ServiceError, match="no teacher answers"):
            await plain.get_teacher()


async def test_tls_lets_other_machines_in_without_further_leave(settings: TeacherSettings, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    server, address = await bind(
        settings.model_copy(update={"host": "0.0.0.0", "tls_certificate": certificate, "tls_key": key}), token=TOKEN
    )
    assert address.startswith("0.0.0.0:")
    await server.stop(None)


async def test_a_file_that_is_no_certificate_is_one_sentence(settings: TeacherSettings, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    certificate.write_text("hello")
    with pytest.raises(ConfigError, match="is not a PEM file") as refusal:
        await bind(settings.model_copy(update={"tls_certificate": certificate, "tls_key": key}), token=TOKEN)
    assert "\n" not in str(refusal.value)


def test_half_of_tls_is_refused(settings: TeacherSettings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both --tls-certificate and --tls-key"):
        TeacherSettings(model=tmp_path, tls_key=tmp_path / "key.pem")
