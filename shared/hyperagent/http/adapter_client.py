"""Client of the adapter service, which turns a prompt into a LoRA adapter in PEFT's format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.errors import Conflict, CorruptRecord
from hyperagent.http.adapter_models import AdapterBody, AdaptersBody, BundleBody, PromptBody
from hyperagent.http.client import ApiClient, AsyncApiClient, Call, json_of
from hyperagent.storage.files import new_directory

_FILES = (MODEL_FILE, CONFIG_FILE)
_PAGE = 100


class AdapterClient(ApiClient):
    """Connection to one adapter service; raises the same errors as `ApiClient`."""

    def create(self, prompt: PromptBody) -> AdapterBody:
        """Return the adapter for a prompt; the service generates it unless it is already stored.

        Raises:
            InvalidRequest: the prompt is empty, or its parts are not those that the hypernetwork reads.
            LimitExceeded: the prompt is longer than the hypernetwork reads.
            Busy: the service's queue of prompts is full.
        """
        return self.send(_create(prompt))

    def adapters(self, *, limit: int = _PAGE, after: str | None = None) -> AdaptersBody:
        """Return up to `limit` adapters in ascending order of id, starting with the first id above `after`."""
        return self.send(_list(limit, after))

    def get(self, adapter_id: str) -> AdapterBody:
        """Return one adapter.

        Raises:
            NotFound: there is no adapter with this id.
        """
        return self.send(_get(adapter_id))

    def bundle(self) -> BundleBody:
        """Return what generates the adapters."""
        return self.send(_BUNDLE)

    def files(self, adapter: AdapterBody) -> dict[str, bytes]:
        """Return the adapter's two files by name.

        Raises:
            CorruptRecord: a file's digest differs from the one that the service gives.
        """
        return _checked(adapter, {name: self.send(_file(adapter, name)) for name in _FILES})

    def download(self, adapter: AdapterBody, folder: Path) -> None:
        """Download the adapter's two files to `folder`, which is replaced atomically or stays unchanged.

        Raises:
            CorruptRecord: a file's digest differs from the one that the service gives.
            Conflict: the folder holds other files, which would be lost.
            StorageError: a file operation failed.
        """
        _save(self.files(adapter), folder)


class AsyncAdapterClient(AsyncApiClient):
    """Asynchronous version of `AdapterClient`."""

    async def create(self, prompt: PromptBody) -> AdapterBody:
        """See `AdapterClient.create`."""
        return await self.send(_create(prompt))

    async def adapters(self, *, limit: int = _PAGE, after: str | None = None) -> AdaptersBody:
        """See `AdapterClient.adapters`."""
        return await self.send(_list(limit, after))

    async def get(self, adapter_id: str) -> AdapterBody:
        """See `AdapterClient.get`."""
        return await self.send(_get(adapter_id))

    async def bundle(self) -> BundleBody:
        """See `AdapterClient.bundle`."""
        return await self.send(_BUNDLE)

    async def files(self, adapter: AdapterBody) -> dict[str, bytes]:
        """See `AdapterClient.files`."""
        return _checked(adapter, {name: await self.send(_file(adapter, name)) for name in _FILES})

    async def download(self, adapter: AdapterBody, folder: Path) -> None:
        """See `AdapterClient.download`."""
        _save(await self.files(adapter), folder)


def _create(prompt: PromptBody) -> Call[AdapterBody]:
    # The service distinguishes a part that is null from one that is omitted.
    return Call("POST", "/v1/adapters", json_of(AdapterBody), body=prompt.model_dump(exclude_unset=True))


def _list(limit: int, after: str | None) -> Call[AdaptersBody]:
    query: dict[str, str | int] = {"limit": limit} if after is None else {"limit": limit, "after": after}
    return Call("GET", "/v1/adapters", json_of(AdaptersBody), query=query)


_BUNDLE = Call("GET", "/v1/bundle", json_of(BundleBody))


def _get(adapter_id: str) -> Call[AdapterBody]:
    return Call("GET", f"/v1/adapters/{adapter_id}", json_of(AdapterBody))


def _file(adapter: AdapterBody, name: str) -> Call[bytes]:
    return Call("GET", f"/v1/adapters/{adapter.id}/{name}", bytes)


def _checked(adapter: AdapterBody, contents: dict[str, bytes]) -> dict[str, bytes]:
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != adapter.sha256.get(name):
            raise CorruptRecord(f"{name} of adapter {adapter.id} arrived damaged; download it again")
    return contents


def _save(contents: Mapping[str, bytes], folder: Path) -> None:
    others = [path.name for path in folder.iterdir() if path.name not in contents] if folder.is_dir() else []
    if others:
        raise Conflict(f"{folder} holds other files than an adapter's, such as {others[0]}; choose another folder")
    with new_directory(folder) as partial:
        for name, content in contents.items():
            (partial / name).write_bytes(content)
