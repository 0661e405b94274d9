"""Building the service: bundle, tokenizer and store are loaded and checked before the first request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from hyperagent import __version__
from hyperagent.http.app import create_app
from hyperagent.model.bundle import load_bundle
from hyperagent_adapter_api.config import AdapterApiSettings
from hyperagent_adapter_api.generator import AdapterGenerator
from hyperagent_adapter_api.routes import router
from hyperagent_adapter_api.service import AdapterService
from hyperagent_adapter_api.store import AdapterStore

MAX_BODY_BYTES = 4 << 20
"""Room for the longest prompt any hypernetwork reads, so that a longer one is refused by its tokens."""


def build_app(settings: AdapterApiSettings, *, token: str) -> FastAPI:
    """The service over the bundle and the store that `settings` name.

    Raises:
        ConfigError: the bundle, its tokenizer or the store's folder cannot be used.
        CorruptRecord: a file of the bundle is not the one that was written.
        IdentityMismatch: the bundle's tokenizer is not the one its hypernetwork was trained with.
        ServiceError: another process holds the store.
    """
    generator = AdapterGenerator(load_bundle(settings.bundle))
    store = AdapterStore(settings.store, max_adapters=settings.max_adapters)
    service = AdapterService(generator, store, max_pending_requests=settings.max_pending_requests)
    return create_adapter_app(service, token=token)


def create_adapter_app(service: AdapterService, *, token: str) -> FastAPI:
    """The REST application over `service`, which it closes when it shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = create_app(
        title="hyperagent adapter service",
        version=__version__,
        token=token,
        max_body_bytes=MAX_BODY_BYTES,
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(router)
    return app
