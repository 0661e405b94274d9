"""Construction of the service; bundle, tokenizer and store are loaded and checked before the first request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
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

_MAX_BODY_BYTES = 4 << 20
_BYTES_PER_CHARACTER = 6
"""The longest form of a character in JSON, such as \\u00e9."""
_OTHER_BYTES = 64 << 10
"""Names, brackets and quotes of a body, those of tools included."""


def build_app(settings: AdapterApiSettings, *, token: str) -> FastAPI:
    """Build the service from the bundle and the store given in `settings`.

    Raises:
        ConfigError: the bundle, its tokenizer or the store's folder cannot be used.
        CorruptRecord: a file of the bundle is damaged.
        IdentityMismatch: the bundle's tokenizer is not the one its hypernetwork was trained with.
    """
    generator = AdapterGenerator(load_bundle(settings.bundle), dtype=getattr(torch, settings.dtype))
    store = AdapterStore(
        settings.store,
        generator.bundle.fingerprint,
        max_bytes=settings.max_store_mib << 20,
        ttl_s=settings.adapter_ttl_s,
    )
    service = AdapterService(generator, store, max_pending_requests=settings.max_pending_requests)
    return create_adapter_app(service, token=token)


def create_adapter_app(service: AdapterService, *, token: str) -> FastAPI:
    """Create the REST application for `service`, which is closed when the application shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.wait_closed()
        await run_in_threadpool(service.close)

    app = create_app(
        title="hyperagent adapter service",
        version=__version__,
        token=token,
        # Every prompt that the service accepts fits; a longer one is refused by its declared length, before it is read.
        max_body_bytes=min(_MAX_BODY_BYTES, _BYTES_PER_CHARACTER * service.max_characters + _OTHER_BYTES),
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(router, prefix="/v1")
    app.include_router(router, include_in_schema=False)  # The same paths without a version, for short commands.
    return app
