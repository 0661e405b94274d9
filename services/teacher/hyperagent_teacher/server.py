"""The teacher's process: bind, load, prove that scoring works, answer, drain.

The port is bound before the model is loaded, so that a busy one is known at once; until the model is loaded a
client's connection waits. Health is SERVING only once a canary has been scored.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from types import FrameType

import grpc
import numpy as np
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hyperagent.cache.hot import HotTier
from hyperagent.cache.store import TopKCache
from hyperagent.errors import ServiceError
from hyperagent.listen import listening_ip
from hyperagent.topk import concatenate
from hyperagent.wire import teacher_pb2, teacher_pb2_grpc
from hyperagent_teacher.admission import Admission
from hyperagent_teacher.config import TeacherSettings
from hyperagent_teacher.engine import ScoringEngine
from hyperagent_teacher.interceptors import RequireToken
from hyperagent_teacher.populate import Populator
from hyperagent_teacher.servicer import TeacherServicer

SERVICE = teacher_pb2.DESCRIPTOR.services_by_name["TeacherService"].full_name

MAX_MESSAGE_BYTES = 16 << 20
"""131,072 tokens, all of them supervised, are 1 MiB; the room above lets a longer one be refused by name."""
FLUSH_S = 1.0
"""What the last answers have to leave the machine; open health watches are cut off after it."""

_CANARY_TOKENS = 8

_log = structlog.get_logger()


def serve(settings: TeacherSettings, *, token: str) -> None:
    """Serve a Transformers model until SIGTERM or SIGINT; requests in progress then get to end.

    Raises:
        ConfigError: a setting, the model or the tokenizer cannot be used.
        IdentityMismatch: the cache belongs to another teacher.
        ServiceError: the port is taken, or the canary fails.
    """
    with _leaving_on_signals(), asyncio.Runner() as runner:
        server, address = runner.run(bind(settings, token=token))
        try:
            engine, cache = _load(settings)
        except BaseException:
            runner.run(server.stop(None))
            raise
        runner.run(_serve_until_signal(server, address, engine, cache, settings))


async def bind(settings: TeacherSettings, *, token: str) -> tuple[grpc.aio.Server, str]:
    """A server that holds its port but answers nothing yet, and its `host:port`.

    Raises:
        ConfigError: there is no such address, or other machines could reach it and `allow_remote` is not set.
        ServiceError: the address cannot be had.
    """
    ip = listening_ip(settings.host, allow_remote=settings.allow_remote)
    server = grpc.aio.server(
        interceptors=[RequireToken(token)],
        options=[
            # gRPC's default lets two processes share a port, each getting some of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ],
    )
    # gRPC would listen on all addresses of a name, and be content if it gets one of them: so it is given a number.
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    try:
        port = server.add_insecure_port(f"{host}:{settings.port}")
    except RuntimeError as error:
        await server.stop(None)
        raise ServiceError(
            f"cannot listen on {host}:{settings.port}: the port is taken or the address is not this machine's; "
            "stop the other process, or give another --port"
        ) from error
    return server, f"{host}:{port}"


async def answer(
    server: grpc.aio.Server,
    engine: ScoringEngine,
    cache: TopKCache,
    settings: TeacherSettings,
    *,
    stop: asyncio.Event,
) -> None:
    """Start a bound server, answer until `stop` is set, drain.

    Raises:
        ServiceError: the engine cannot score a canary.
    """
    admission = Admission(max_pending_requests=settings.max_pending_requests)
    populator = Populator(engine, cache, data_dir=settings.data_dir)
    teacher_pb2_grpc.add_TeacherServiceServicer_to_server(TeacherServicer(engine, populator, admission), server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    await _set_health(health_servicer, health_pb2.HealthCheckResponse.NOT_SERVING)
    if settings.reflection:
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        await server.start()
        await _score_canary(engine)
        admission.open()
        await _set_health(health_servicer, health_pb2.HealthCheckResponse.SERVING)
        _log.info("serving", model=engine.identity.model, fingerprint=engine.identity.fingerprint)
        await stop.wait()
        admission.close()
        await health_servicer.enter_graceful_shutdown()
        _log.info("draining", pending=admission.pending, grace_s=settings.stop_grace_s)
        await admission.wait_until_empty(settings.stop_grace_s)
    finally:
        await server.stop(FLUSH_S)


async def _serve_until_signal(
    server: grpc.aio.Server, address: str, engine: ScoringEngine, cache: TopKCache, settings: TeacherSettings
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    _log.info("listening", address=address)
    try:
        await answer(server, engine, cache, settings, stop=stop)
    finally:
        engine.close()
    _log.info("stopped")


def _load(settings: TeacherSettings) -> tuple[ScoringEngine, TopKCache]:
    _log.info("loading", model=str(settings.model))
    hot = _hot_tier(settings)
    # Importing torch takes seconds; here, a busy port is known before.
    from hyperagent_teacher.transformers_engine import TransformersEngine

    engine = TransformersEngine(
        settings.model,
        tokenizer_folder=settings.tokenizer or settings.model,
        top_k=settings.top_k,
        max_tokens=settings.max_tokens,
        dtype=settings.dtype,
        device=settings.device,
    )
    return engine, TopKCache.create_or_open(settings.cache, engine.identity, hot=hot)


def _hot_tier(settings: TeacherSettings) -> HotTier | None:
    if settings.redis_url is None:
        return None
    return HotTier.connect(settings.redis_url, ttl_s=settings.redis_ttl_s)


async def _score_canary(engine: ScoringEngine) -> None:
    identity = engine.identity
    token_ids = np.arange(_CANARY_TOKENS, dtype=np.uint32) % identity.vocab_size
    positions = np.arange(1, _CANARY_TOKENS, dtype=np.uint32)
    async with aclosing(engine.score(token_ids, positions, top_k=identity.top_k)) as parts:
        rows = concatenate([part async for part in parts])
    rows.validate(num_tokens=_CANARY_TOKENS, vocab_size=identity.vocab_size)


async def _set_health(servicer: health.aio.HealthServicer, status: int) -> None:
    for name in ("", SERVICE):
        await servicer.set(name, status)


@contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """Exit with code 0 on SIGTERM and SIGINT while there is nothing to drain yet."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(0)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
