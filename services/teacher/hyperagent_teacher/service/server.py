"""Run the teacher's process: bind the port, load the model, check that scoring works, answer requests, drain.

The port is bound before the model is loaded, so that a port in use is reported at once; until the model is loaded,
clients' connections wait. Health is SERVING once a canary has been scored and as long as the engine makes progress
(`watchdog.py`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hyperagent.cache.hot_tier import HotTier
from hyperagent.cache.local import LocalCache
from hyperagent.errors import EngineHangs, ServiceError
from hyperagent.net import listening_ip
from hyperagent.wire import teacher_pb2, teacher_pb2_grpc
from hyperagent.wire.pem import read_pem
from hyperagent_teacher.config import TeacherSettings
from hyperagent_teacher.engines.base import ScoringEngine
from hyperagent_teacher.engines.load import load_engine
from hyperagent_teacher.service.admission import Admission
from hyperagent_teacher.service.auth import RequireToken
from hyperagent_teacher.service.canary import score_canary
from hyperagent_teacher.service.memory_budget import MemoryBudget
from hyperagent_teacher.service.populate import Populator
from hyperagent_teacher.service.servicer import TeacherServicer
from hyperagent_teacher.service.watchdog import Watchdog

SERVICE = teacher_pb2.DESCRIPTOR.services_by_name["TeacherService"].full_name

MAX_MESSAGE_BYTES = 16 << 20
"""Largest message accepted. 131,072 tokens, all supervised, take 1 MiB; larger requests get a clear refusal."""
FLUSH_S = 1.0
"""Seconds for the last responses to leave the machine; open health watches are cut off after that."""

_log = structlog.get_logger()


def serve(settings: TeacherSettings, *, token: str) -> None:
    """Serve a model until SIGTERM or SIGINT, then let the requests in progress finish.

    Raises:
        ConfigError: a setting, the model or the tokenizer cannot be used.
        IdentityMismatch: the cache belongs to another teacher.
        ServiceError: the port is taken, or the canary fails.
    """
    with _exit_on_signals(), asyncio.Runner() as runner:
        server, address = runner.run(bind(settings, token=token))
        try:
            _log.info("loading", model=str(settings.model), backend=settings.backend)
            engine = runner.run(load_engine(settings))
            hot = HotTier.connect(settings.redis_url, ttl_s=settings.redis_ttl_s) if settings.redis_url else None
            cache = LocalCache.create_or_open(
                settings.cache, engine.identity, settings=settings.cache_settings, hot=hot
            )
        except BaseException:
            runner.run(server.stop(None))
            raise
        runner.run(_serve_until_signal(server, address, engine, cache, settings))


async def bind(settings: TeacherSettings, *, token: str) -> tuple[grpc.aio.Server, str]:
    """Return a server that holds its port but does not answer yet, and its `host:port`.

    Raises:
        ConfigError: there is no such address, or other machines could reach it and `allow_remote` is not set.
        ServiceError: the address is taken.
    """
    is_encrypted = settings.tls_certificate is not None
    ip = listening_ip(settings.host, allow_remote=settings.allow_remote or is_encrypted)
    credentials = _credentials(settings)
    server = grpc.aio.server(
        interceptors=[RequireToken(token)],
        options=[
            # gRPC's default lets two processes share a port, each getting some of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            # Accept the clients' keepalive pings (hyperagent.wire.client), at which gRPC's default closes the connection.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
    # Given a name, gRPC listens on all its addresses and accepts if only one of them works, so give it an IP address.
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    try:
        target = f"{host}:{settings.port}"
        port = server.add_secure_port(target, credentials) if credentials else server.add_insecure_port(target)
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
    cache: LocalCache,
    settings: TeacherSettings,
    *,
    stop: asyncio.Event,
) -> None:
    """Start a bound server, answer requests until `stop` is set, and drain.

    Raises:
        ServiceError: the engine cannot score a canary, or hangs and cannot be restarted.
    """
    admission = Admission(max_pending_requests=settings.max_pending_requests)
    row_memory = MemoryBudget(settings.row_memory_mib << 20)
    populator = Populator(engine, cache, row_memory, data_dir=settings.data_dir)
    servicer = TeacherServicer(
        engine,
        populator,
        admission,
        row_memory,
        buffer_folder=cache.root,
        chunk_bytes=settings.chunk_kib << 10,
    )
    teacher_pb2_grpc.add_TeacherServiceServicer_to_server(servicer, server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    await _set_health(health_servicer, health_pb2.HealthCheckResponse.NOT_SERVING)
    if settings.reflection:
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        await server.start()
        await score_canary(engine)
        admission.open()
        await _set_health(health_servicer, health_pb2.HealthCheckResponse.SERVING)
        _log.info("serving", model=engine.identity.model, fingerprint=engine.identity.fingerprint)
        await _until_stopped(stop, engine, admission, health_servicer, settings)
        admission.close("it is shutting down")
        await health_servicer.enter_graceful_shutdown()
        _log.info("draining", pending=admission.pending, grace_s=settings.stop_grace_s)
        await admission.wait_until_empty(settings.stop_grace_s)
    finally:
        await server.stop(FLUSH_S)


async def _until_stopped(
    stop: asyncio.Event,
    engine: ScoringEngine,
    admission: Admission,
    health_servicer: health.aio.HealthServicer,
    settings: TeacherSettings,
) -> None:
    async def set_serving(is_alive: bool) -> None:
        if is_alive:
            admission.open()
            await _set_health(health_servicer, health_pb2.HealthCheckResponse.SERVING)
        else:
            admission.close("its engine does not respond")
            await _set_health(health_servicer, health_pb2.HealthCheckResponse.NOT_SERVING)

    watchdog = Watchdog(engine, timeout_s=settings.engine_timeout_s, restart_after_s=settings.engine_restart_s)
    watching = asyncio.create_task(watchdog.watch(set_serving))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
    finally:
        for task in (watching, stopping):
            task.cancel()
        await asyncio.wait({watching, stopping})


async def _serve_until_signal(
    server: grpc.aio.Server, address: str, engine: ScoringEngine, cache: LocalCache, settings: TeacherSettings
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    _log.info("listening", address=address)
    try:
        await answer(server, engine, cache, settings, stop=stop)
    except EngineHangs as error:
        # The hanging thread would keep the interpreter from exiting, and so a supervisor from starting a new teacher.
        _log.error("exiting", reason=str(error))
        os._exit(1)
    finally:
        cache.close()
        engine.close()
    _log.info("stopped")


def _credentials(settings: TeacherSettings) -> grpc.ServerCredentials | None:
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    pair = (read_pem(settings.tls_key), read_pem(settings.tls_certificate))
    return grpc.ssl_server_credentials([pair])


async def _set_health(servicer: health.aio.HealthServicer, status: int) -> None:
    for name in ("", SERVICE):
        await servicer.set(name, status)


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Exit with code 0 on SIGTERM and SIGINT while there is nothing to drain yet."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(0)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
