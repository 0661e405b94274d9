"""Store of adapters on disk, each in a folder that PEFT and vLLM can load directly.

ID/adapter_model.safetensors   the factors
ID/adapter_config.json         PEFT's LoraConfig
ID/adapter.json                metadata of this service

An id is a digest of the adapter's inputs, so it is known before the adapter is generated, and generating an adapter
twice stores it once. Folders are created and deleted atomically.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import ValidationError

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.config import describe
from hyperagent.errors import ConfigError, CorruptRecord, NotFound, ServiceError, StorageError
from hyperagent.http.adapter_models import Novelty, StoredAdapter
from hyperagent.model.bundle import Bundle
from hyperagent.model.peft_io import AdapterFiles
from hyperagent.storage.file_lock import open_locked
from hyperagent.storage.files import fsync_directory, is_temporary, new_directory

ID_PATTERN = "^[0-9a-f]{64}$"

_RECORD_FILE = "adapter.json"
_RETIRED_PREFIX = ".retired-"


def id_of(bundle: Bundle, prompt_ids: NDArray[np.uint32]) -> str:
    """Return the id of the adapter that `bundle` generates for prompt ids [P]."""
    return blake3(bytes.fromhex(bundle.fingerprint) + prompt_ids.astype("<u4").tobytes()).hexdigest()


class AdapterStore:
    """Folder of adapters, used by one process at a time; thread-safe."""

    def __init__(self, root: Path, *, max_adapters: int) -> None:
        """Create the folder if necessary, lock it, and remove leftovers of a killed process.

        Raises:
            ConfigError: the folder cannot be used.
            ServiceError: another process uses it.
        """
        self._root = root
        self._max_adapters = max_adapters
        self._lock = _hold(root)
        for path in root.iterdir():
            if is_temporary(path) or path.name.startswith(_RETIRED_PREFIX):
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Release the folder."""
        os.close(self._lock)

    def get(self, adapter_id: str) -> StoredAdapter:
        """Return the metadata of an adapter.

        Raises:
            NotFound: there is no adapter with this id.
            CorruptRecord: its metadata is damaged.
        """
        path = self._folder(adapter_id) / _RECORD_FILE
        try:
            return StoredAdapter.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise _not_found(adapter_id) from None
        except ValidationError as error:
            raise CorruptRecord(
                f"the record of adapter {adapter_id} is damaged ({describe(error)}); delete the adapter and make it again"
            ) from error

    def page(self, *, after: str | None, limit: int) -> list[StoredAdapter]:
        """Return up to `limit` adapters in ascending order of id, starting with the first id above `after`.

        Raises:
            CorruptRecord: the metadata of one of them is damaged.
        """
        found: list[StoredAdapter] = []
        for adapter_id in sorted(self._ids()):
            if after is not None and adapter_id <= after:
                continue
            if len(found) == limit:
                break
            try:
                found.append(self.get(adapter_id))
            except NotFound:
                continue  # Deleted since the folder was listed.
        return found

    def open(self, adapter_id: str, name: str) -> tuple[StoredAdapter, BinaryIO]:
        """Return an adapter's metadata and one of its two files, which remains readable if the adapter is deleted.

        Raises:
            NotFound: there is no adapter with this id.
            CorruptRecord: its metadata or the file is damaged.
        """
        adapter = self.get(adapter_id)
        try:
            file = (self._folder(adapter_id) / name).open("rb")
        except FileNotFoundError:
            self.get(adapter_id)  # Deleted since its metadata was read.
            raise CorruptRecord(f"adapter {adapter_id} lacks {name}; delete the adapter and make it again") from None
        if name == MODEL_FILE and os.fstat(file.fileno()).st_size != adapter.bytes:
            file.close()
            raise CorruptRecord(
                f"{name} of adapter {adapter_id} does not have its {adapter.bytes} bytes; delete the adapter and make it again"
            )
        return adapter, file

    def require_room(self) -> None:
        """Require that the store has room for another adapter.

        Raises:
            StorageError: the store is full.
        """
        if len(self._ids()) >= self._max_adapters:
            raise StorageError(
                f"the store holds {self._max_adapters} adapters, the maximum (--max-adapters); "
                "delete some or raise the limit"
            )

    def put(
        self, adapter_id: str, files: AdapterFiles, *, bundle: Bundle, prompt_tokens: int, novelty: Novelty | None
    ) -> StoredAdapter:
        """Store an adapter atomically.

        Raises:
            StorageError: a file operation failed.
        """
        adapter = StoredAdapter(
            id=adapter_id,
            created_at=datetime.now(UTC),
            prompt_tokens=prompt_tokens,
            rank=bundle.manifest.rank,
            bytes=len(files.model),
            sha256={
                MODEL_FILE: hashlib.sha256(files.model).hexdigest(),
                CONFIG_FILE: hashlib.sha256(files.config).hexdigest(),
            },
            base_model=bundle.manifest.base_model,
            bundle=bundle.fingerprint,
            data=bundle.manifest.data.fingerprint,
            novelty=novelty,
        )
        with new_directory(self._folder(adapter_id)) as temporary:
            (temporary / MODEL_FILE).write_bytes(files.model)
            (temporary / CONFIG_FILE).write_bytes(files.config)
            (temporary / _RECORD_FILE).write_text(adapter.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return adapter

    def delete(self, adapter_id: str) -> None:
        """Remove an adapter.

        Raises:
            NotFound: there is no adapter with this id.
            StorageError: a file operation failed; the adapter still exists.
        """
        retired = self._root / f"{_RETIRED_PREFIX}{uuid.uuid4().hex}"
        try:
            # Renamed first, so that no reader sees a partially deleted adapter.
            self._folder(adapter_id).rename(retired)
            fsync_directory(self._root)
        except FileNotFoundError:
            raise _not_found(adapter_id) from None
        except OSError as error:
            raise StorageError(
                f"could not delete adapter {adapter_id}: {error.strerror}; check the store's folder"
            ) from error
        shutil.rmtree(retired, ignore_errors=True)

    def _ids(self) -> list[str]:
        return [entry.name for entry in os.scandir(self._root) if re.fullmatch(ID_PATTERN, entry.name)]

    def _folder(self, adapter_id: str) -> Path:
        if not re.fullmatch(ID_PATTERN, adapter_id):
            raise NotFound("there is no such adapter: an id is 64 hexadecimal digits; GET /v1/adapters lists them")
        return self._root / adapter_id


def _not_found(adapter_id: str) -> NotFound:
    return NotFound(f"there is no adapter {adapter_id}; GET /v1/adapters lists all adapters")


def _hold(root: Path) -> int:
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise ConfigError(f"cannot keep adapters in {root}: it is not writable; choose another --store")
        return open_locked(root, exclusive=True)
    except BlockingIOError:
        raise ServiceError(f"another adapter service uses {root}; stop it, or choose another --store") from None
    except OSError as error:
        raise ConfigError(f"cannot keep adapters in {root}: {error.strerror}; choose another --store") from error
