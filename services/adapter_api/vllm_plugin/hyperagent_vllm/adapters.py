"""The adapters that one API server of vLLM knows: fetched, checked, loaded once, and unloaded when nobody uses them."""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
import torch
from torch import nn

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.auth import read_token
from hyperagent.errors import InvalidRequest, ServiceError
from hyperagent.http.adapter_client import AsyncAdapterClient
from hyperagent.http.adapter_models import BundleBody
from hyperagent_vllm.conversation import prompt_of
from hyperagent_vllm.settings import PluginSettings
from hyperagent_vllm.staging import Shapes, Staging, require_sound

PREFIX = "hyper:"
_AUTO = "auto"
_ID = re.compile("[0-9a-f]{64}")
_BUNDLE_TTL_S = 60.0
_KEEP_S = 60.0
"""An adapter is unloaded at the earliest so long after it was asked for: its request may not have reached the engine yet."""

_log = structlog.get_logger()


class EngineAdapters:
    """Adapters of one engine, for one API server; used on its event loop only."""

    def __init__(self, models: Any, settings: PluginSettings) -> None:
        """Prepare; nothing is fetched yet.

        Args:
            models: vLLM's `OpenAIServingModels`.
        """
        self._models = models
        self._engine = models.engine_client
        self._settings = settings
        self._staging = Staging(settings.staging)
        self._client = AsyncAdapterClient(settings.service, read_token())
        self._is_connected = False
        self._loads = asyncio.Semaphore(settings.max_loads)
        self._in_flight: dict[str, asyncio.Task[None]] = {}
        self._used_at: OrderedDict[str, float] = OrderedDict()
        """Time of the last request by adapter id, the most recent last."""
        self._bundle: tuple[float, BundleBody] | None = None
        self._shapes: Shapes | None = None

    async def resolve(self, request: Any) -> str:
        """Return the name under which vLLM knows the adapter that a request's `hyper:...` means; load it if necessary.

        Raises:
            InvalidRequest: the name is none, or the request has no condition.
            NotFound: there is no such adapter.
            HyperagentError: the adapter cannot be made, fetched or loaded.
        """
        if not self._is_connected:  # Only now is there an event loop; the connection lasts as long as the server.
            self._is_connected = True
            await self._client.__aenter__()
        wanted = str(request.model).removeprefix(PREFIX)
        if wanted == _AUTO:
            async with self._limit("generate an adapter"):
                bundle = await self._read_bundle()
                adapter_id = (await self._client.create(prompt_of(request, bundle.condition))).id
        elif _ID.fullmatch(wanted):
            adapter_id = wanted
        else:
            raise InvalidRequest(
                f"{request.model!r} names no adapter; use hyper:auto, or hyper: and the id of an adapter"
            )
        if adapter_id not in self._used_at:
            if (task := self._in_flight.get(adapter_id)) is None:
                task = asyncio.get_running_loop().create_task(self._load(adapter_id))
                self._in_flight[adapter_id] = task
                task.add_done_callback(lambda done: self._forget(adapter_id, done))
            # Shielded: other requests may wait for the same adapter when this one is canceled.
            await asyncio.shield(task)
        self._used_at[adapter_id] = time.monotonic()
        self._used_at.move_to_end(adapter_id)
        return f"{PREFIX}{adapter_id}"

    @asynccontextmanager
    async def _limit(self, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                yield
        except TimeoutError:
            raise ServiceError(
                f"the adapter service at {self._settings.service} did not {what} within {self._settings.timeout_s:g} s "
                "(HYPERAGENT_VLLM_TIMEOUT_S)"
            ) from None

    async def _read_bundle(self) -> BundleBody:
        if self._bundle is None or time.monotonic() - self._bundle[0] > _BUNDLE_TTL_S:
            self._bundle = time.monotonic(), await self._client.bundle()
        return self._bundle[1]

    def _forget(self, adapter_id: str, task: asyncio.Task[None]) -> None:
        del self._in_flight[adapter_id]
        if not task.cancelled():
            task.exception()  # Retrieved here, because every request that waited for it may have gone.

    async def _load(self, adapter_id: str) -> None:
        from vllm.lora.request import LoRARequest

        async with self._loads:
            started = time.monotonic()
            async with self._limit("send an adapter"):
                contents = await self._client.files(await self._client.get(adapter_id))
            shapes = await self._read_shapes()
            max_rank = self._engine.vllm_config.lora_config.max_lora_rank
            await asyncio.to_thread(
                require_sound, contents[MODEL_FILE], contents[CONFIG_FILE], shapes, max_rank=max_rank
            )
            folder = self._staging.write(adapter_id, contents[MODEL_FILE], contents[CONFIG_FILE])
            name, number = f"{PREFIX}{adapter_id}", number_of(adapter_id)
            if any(other.lora_int_id == number for other in self._models.lora_requests.values()):
                self._staging.remove(adapter_id)
                raise ServiceError(f"another adapter has the number {number} in the engine; unload it first")
            request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))
            try:
                await self._engine.add_lora(request)
            except Exception as error:  # whatever the engine raises, which reaches us as text
                self._staging.remove(adapter_id)
                raise ServiceError(
                    f"the engine cannot load adapter {adapter_id}: {' '.join(str(error).split())}"
                ) from error
            self._models.lora_requests[name] = request
            self._used_at[adapter_id] = time.monotonic()
        _log.info(
            "adapter loaded", id=adapter_id, seconds=round(time.monotonic() - started, 3), known=len(self._used_at)
        )
        await self._make_room()

    async def _read_shapes(self) -> Shapes:
        if self._shapes is None:
            self._shapes = await asyncio.to_thread(_shapes_of, self._engine.vllm_config.model_config.hf_config)
        return self._shapes

    async def _make_room(self) -> None:
        """Unload the least recently used adapters that no request uses, until at most as many as allowed are known."""
        busy = {state.lora_name for state in self._engine.output_processor.request_states.values()}
        for adapter_id, used_at in list(self._used_at.items()):
            if len(self._used_at) <= self._settings.max_adapters or time.monotonic() - used_at < _KEEP_S:
                return
            name = f"{PREFIX}{adapter_id}"
            if name in busy:
                continue
            # First of all, no further request may be given this name.
            del self._used_at[adapter_id]
            request = self._models.lora_requests.pop(name)
            await self._engine.remove_lora(request.lora_int_id)
            self._staging.remove(adapter_id)
            _log.info("adapter unloaded", id=adapter_id)


def number_of(adapter_id: str) -> int:
    """Return the engine's number of an adapter: 31 bits of its id, so that several API servers agree on it."""
    return (int(adapter_id[:8], 16) & 0x7FFF_FFFF) or 1


def _shapes_of(config: Any) -> Shapes:
    """Return the sizes of a model's linear layers, from its configuration alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
