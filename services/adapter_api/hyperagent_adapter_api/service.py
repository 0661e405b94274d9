"""Adapter service: a bounded queue of prompts and one worker that turns them into stored adapters.

There is one worker because a forward pass already uses every core that torch may use. It also ensures that two equal
concurrent requests yield one adapter: the second finds the adapter that the first has stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from hyperagent.errors import Busy, NotFound
from hyperagent.http.adapter_models import StoredAdapter
from hyperagent_adapter_api.generator import AdapterGenerator
from hyperagent_adapter_api.store import AdapterStore, id_of

_log = structlog.get_logger()


class AdapterService:
    """Generate adapters and keep them in `store`."""

    def __init__(self, generator: AdapterGenerator, store: AdapterStore, *, max_pending_requests: int) -> None:
        self.bundle = generator.bundle
        self.store = store
        self._generator = generator
        self._max_pending_requests = max_pending_requests
        self._pending = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    async def create(self, parts: Mapping[str, Any]) -> tuple[StoredAdapter, bool]:
        """Return the adapter for a prompt's parts, and whether it is new; call it only on the event loop's thread.

        Raises:
            Busy: the queue of prompts is full.
            InvalidRequest: the parts are not those that the hypernetwork reads, or cannot be read.
            LimitExceeded: the prompt is longer than the hypernetwork reads.
            StorageError: the adapter could not be stored; nothing of it was.
        """
        if self._pending >= self._max_pending_requests:
            raise Busy(
                f"the service already holds {self._pending} prompts, the most it accepts (--max-pending-requests); "
                "try again later"
            )
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._create, parts)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Finish the prompt in progress, drop waiting prompts, and close the store."""
        self._worker.shutdown(cancel_futures=True)
        self.store.close()

    def _create(self, parts: Mapping[str, Any]) -> tuple[StoredAdapter, bool]:
        prompt_ids = self._generator.encode(parts)
        adapter_id = id_of(self.bundle, prompt_ids)
        try:
            return self.store.get(adapter_id), False
        except NotFound:
            self.store.require_room()
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
        return adapter, True
