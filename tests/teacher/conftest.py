"""Fixtures: tiny random teachers on disk, made once per test session, and a running service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from teacher_service import (
    CANARY_ROWS,
    TOKEN,
    GatedEngine,
    Serve,
)
from tiny_models import write_models

from hyperagent.cache.local import LocalCache
from hyperagent.identity import TokenizerIdentity
from hyperagent.wire.client import TeacherClient
from hyperagent_teacher.config import TeacherSettings
from hyperagent_teacher.engines.base import ScoringEngine
from hyperagent_teacher.engines.transformers import TransformersEngine
from hyperagent_teacher.service.server import answer, bind

TOP_K = 16
MAX_TOKENS = 2048
TEMPERATURES = (0.5, 2.0)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with model and tokenizer, by architecture."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def engines(model_folders: dict[str, Path]) -> Iterator[dict[str, TransformersEngine]]:
    """Engines by architecture; no test may close them."""
    engines = {
        name: TransformersEngine(
            folder, tokenizer_folder=folder, top_k=TOP_K, max_tokens=MAX_TOKENS, temperatures=TEMPERATURES
        )
        for name, folder in model_folders.items()
    }
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="session")
def engine(engines: dict[str, TransformersEngine]) -> TransformersEngine:
    return engines["qwen3_moe"]


@pytest.fixture
def sequence(engine: TransformersEngine) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """60 token ids and 20 positions."""
    generator = np.random.default_rng(0)
    token_ids = generator.integers(0, engine.identity.vocab_size, 60).astype(np.uint32)
    positions = np.sort(generator.choice(np.arange(1, 60), 20, replace=False)).astype(np.uint32)
    return token_ids, positions


@pytest.fixture
def settings(tmp_path: Path) -> TeacherSettings:
    (tmp_path / "data").mkdir()
    return TeacherSettings(
        model=tmp_path, cache=tmp_path / "cache", data_dir=tmp_path / "data", port=0, max_pending_requests=2
    )


@pytest.fixture
def cache(settings: TeacherSettings, engine: ScoringEngine) -> LocalCache:
    return LocalCache.create_or_open(settings.cache, engine.identity)


@pytest.fixture
def serve(settings: TeacherSettings, engine: ScoringEngine, cache: LocalCache) -> Serve:
    """Run a teacher and yield a client for it; by default with the real engine, once the teacher serves."""

    @asynccontextmanager
    async def run(
        engine: ScoringEngine = engine,
        cache: LocalCache = cache,
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
    """An engine with just enough permits for the canary."""
    return GatedEngine(engine.identity, permits=CANARY_ROWS)


@pytest.fixture
def tokenizer(engine: ScoringEngine) -> TokenizerIdentity:
    return TokenizerIdentity(engine.identity.tokenizer_sha256, engine.identity.template_sha256)
