"""Adapter service: reads prompts, answers known ones at once, and generates each new adapter once.

Only generations queue. A prompt whose adapter is stored, or is being generated for another request, waits behind nothing
and takes no place in the queue. There is one generating worker, because a forward pass already uses every core that torch
may use; prompts are tokenized by another, so that a long one delays no generation.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import structlog
from blake3 import blake3
from numpy.typing import NDArray

from hyperagent.errors import Busy, LimitExceeded, NotFound, NotServing
from hyperagent.http.adapter_models import StoredAdapter
from hyperagent_adapter_api.generator import AdapterGenerator
from hyperagent_adapter_api.store import AdapterStore

_CHARACTERS_PER_TOKEN = 8
"""Text has about four characters per token; one with twice as many is refused before it is tokenized."""
_MIN_CHARACTERS = 16 << 10
_MAX_KNOWN_PROMPTS = 4096
_FIRST_GUESS_S = 1.0
"""Time of a generation until one has been measured."""

_log = structlog.get_logger()


class AdapterService:
    """Generate adapters and keep them in `store`; call its coroutines only on one event loop."""

    def __init__(self, generator: AdapterGenerator, store: AdapterStore, *, max_pending_requests: int) -> None:
        self.bundle = generator.bundle
        self.store = store
        self._generator = generator
        self._max_pending = max_pending_requests
        self.max_characters = max(_MIN_CHARACTERS, _CHARACTERS_PER_TOKEN * self.bundle.manifest.max_prompt_tokens)
        """Most characters of a prompt's parts together."""
        self._known: OrderedDict[str, str] = OrderedDict()
        """Ids of adapters by digest of the prompt's parts, the most recently used last."""
        self._in_flight: dict[str, asyncio.Task[StoredAdapter]] = {}
        self._reading: dict[str, asyncio.Future[NDArray[np.uint32]]] = {}
        self._seconds = _FIRST_GUESS_S
        self._is_closing = False
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read")
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    async def create(self, parts: Mapping[str, Any]) -> tuple[StoredAdapter, bool]:
        """Return the adapter for a prompt's parts, and whether this request made it.

        Raises:
            Busy: as many adapters wait to be generated as the service accepts; `retry_after_s` says when to try again.
            NotServing: the service is stopping.
            InvalidRequest: the parts are not those that the hypernetwork reads, or cannot be read.
            LimitExceeded: the prompt is longer than the hypernetwork reads.
            StorageError: the adapter could not be stored; nothing of it was.
        """
        if self._is_closing:
            raise NotServing("the service is stopping; try again in a moment")
        self._require_characters(parts)
        digest = blake3(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        if (adapter_id := self._known.get(digest)) is not None:
            self._known.move_to_end(digest)
            if (found := await self._find(adapter_id)) is not None:
                return found, False
        prompt_ids = await self._read(digest, parts)
        adapter_id = self._remember(digest, prompt_ids)
        if (found := await self._find(adapter_id)) is not None:
            return found, False
        # Shielded: other requests may wait for the same adapter when this one's caller gives up.
        return await asyncio.shield(self._start(adapter_id, prompt_ids)), True

    async def wait_closed(self) -> None:
        """Accept no more prompts, and wait until every accepted one has its adapter."""
        self._is_closing = True
        await asyncio.gather(*self._in_flight.values(), *self._reading.values(), return_exceptions=True)

    def close(self) -> None:
        """Stop the workers and close the store."""
        self._reader.shutdown()
        self._worker.shutdown()
        self.store.close()

    def _require_characters(self, parts: Mapping[str, Any]) -> None:
        found = _num_characters(list(parts.values()))
        if found > self.max_characters:
            raise LimitExceeded(
                f"the prompt has {found:,} characters; this hypernetwork reads {self.bundle.manifest.max_prompt_tokens:,} tokens, "
                f"so at most {self.max_characters:,} characters are accepted; shorten it"
            )

    async def _find(self, adapter_id: str) -> StoredAdapter | None:
        """Return an adapter that is stored, or wait for one that is being generated; None if there is neither."""
        if (task := self._in_flight.get(adapter_id)) is not None:
            return await asyncio.shield(task)
        try:
            return self.store.use(adapter_id)
        except NotFound:
            return None

    async def _read(self, digest: str, parts: Mapping[str, Any]) -> NDArray[np.uint32]:
        """Return the prompt's ids [P]; equal prompts at once are tokenized once."""
        if (reading := self._reading.get(digest)) is None:
            loop = asyncio.get_running_loop()
            reading = loop.run_in_executor(self._reader, self._generator.encode, parts)
            self._reading[digest] = reading
            reading.add_done_callback(lambda done: self._end_reading(digest, done))
        return await asyncio.shield(reading)

    def _end_reading(self, digest: str, reading: asyncio.Future[NDArray[np.uint32]]) -> None:
        del self._reading[digest]
        if not reading.cancelled():
            reading.exception()  # Retrieved here, because every request that waited for it may have gone.

    def _remember(self, digest: str, prompt_ids: NDArray[np.uint32]) -> str:
        adapter_id = self._known[digest] = self._generator.id_of(prompt_ids)
        if len(self._known) > _MAX_KNOWN_PROMPTS:
            self._known.popitem(last=False)
        return adapter_id

    def _start(self, adapter_id: str, prompt_ids: NDArray[np.uint32]) -> asyncio.Task[StoredAdapter]:
        if len(self._in_flight) >= self._max_pending:
            wait_s = math.ceil(self._seconds * len(self._in_flight))
            raise Busy(
                f"{self._max_pending} adapters wait to be generated, the most that the service accepts "
                f"(--max-pending-requests); try again in about {wait_s} s",
                retry_after_s=wait_s,
            )
        task = asyncio.get_running_loop().create_task(self._generate(adapter_id, prompt_ids))
        self._in_flight[adapter_id] = task
        task.add_done_callback(lambda done: self._forget(adapter_id, done))
        return task

    def _forget(self, adapter_id: str, task: asyncio.Task[StoredAdapter]) -> None:
        del self._in_flight[adapter_id]
        if not task.cancelled():
            task.exception()  # Retrieved here, because every request that waited for it may have gone.

    async def _generate(self, adapter_id: str, prompt_ids: NDArray[np.uint32]) -> StoredAdapter:
        loop = asyncio.get_running_loop()
        started = loop.time()
        adapter = await loop.run_in_executor(self._worker, self._make, adapter_id, prompt_ids)
        waiting = max(1, len(self._in_flight))
        self._seconds += 0.2 * ((loop.time() - started) / waiting - self._seconds)
        return adapter

    def _make(self, adapter_id: str, prompt_ids: NDArray[np.uint32]) -> StoredAdapter:
        files, novelty = self._generator.generate(prompt_ids)
        adapter = self.store.put(adapter_id, files, bundle=self.bundle, prompt_tokens=prompt_ids.size, novelty=novelty)
        _log.info("adapter made", id=adapter_id, prompt_tokens=adapter.prompt_tokens, bytes=adapter.bytes)
        if novelty is not None and novelty.is_unusual:
            _log.warning(
                "the prompt is unlike the training prompts: the adapter may be worse than none",
                id=adapter_id,
                distance=novelty.distance,
                threshold=novelty.threshold,
            )
        return adapter


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_num_characters(key) + _num_characters(item) for key, item in value.items())
    return sum(map(_num_characters, value)) if isinstance(value, list | tuple) else 0
