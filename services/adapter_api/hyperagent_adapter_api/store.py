"""Store of adapters on disk, each in a folder that PEFT and vLLM can load directly.

BUNDLE/ID/adapter_model.safetensors   the factors
BUNDLE/ID/adapter_config.json         PEFT's LoraConfig
BUNDLE/ID/adapter.json                metadata of this service; its modification time is the adapter's last use
BUNDLE/.leases/ID/HOLDER              a lease; its modification time is when it ends

BUNDLE is the beginning of a bundle's fingerprint, so that several bundles share a store without seeing each other's adapters.
An id is a digest of the adapter's inputs, so it is known before the adapter is generated, and an adapter that was evicted or
damaged is made again under the same id. Therefore nothing is synchronized to the disk: folders appear by a rename, and bytes
are checked against their digests when they are first read after a start, and whenever a file has changed. Several processes
can use one store.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import structlog
from pydantic import ValidationError

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.errors import ConfigError, Conflict, NotFound, StorageError
from hyperagent.http.adapter_models import Lease, Novelty, StoredAdapter
from hyperagent.model.bundle import Bundle
from hyperagent.model.peft_io import AdapterFiles
from hyperagent.storage.file_lock import open_locked
from hyperagent.storage.files import is_temporary, new_directory

ID_PATTERN = "^[0-9a-f]{64}$"
HOLDER_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"

_RECORD_FILE = "adapter.json"
_LEASES = ".leases"
_RETIRED_PREFIX = ".retired-"
_DAMAGED_PREFIX = ".damaged-"
_FINGERPRINT_CHARACTERS = 16

_log = structlog.get_logger()


class AdapterStore:
    """Adapters of one bundle; thread-safe, and shared with other processes."""

    def __init__(self, root: Path, bundle_fingerprint: str, *, max_bytes: int, ttl_s: float | None = None) -> None:
        """Create the folder if necessary, and remove leftovers of killed processes if no other process uses the store.

        Args:
            max_bytes: total size of the adapters; the least recently used are evicted to stay below it.
            ttl_s: seconds after which an adapter that nobody used is evicted.

        Raises:
            ConfigError: the folder cannot be used.
        """
        self._root = root / bundle_fingerprint[:_FINGERPRINT_CHARACTERS]
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._changing = threading.Lock()
        self._checked: dict[str, tuple[tuple[int, int, int], ...]] = {}
        """Inode, modification time and size of the files of an adapter whose bytes were checked."""
        self._lock = _hold(self._root)

    def close(self) -> None:
        """Release the folder."""
        os.close(self._lock)

    def get(self, adapter_id: str) -> StoredAdapter:
        """Return the metadata of an adapter whose files are the ones that were written.

        An adapter that is damaged is quarantined, as if there were none, so that it is made again.

        Raises:
            NotFound: there is no adapter with this id, or it has expired.
        """
        folder = self._folder(adapter_id)
        try:
            adapter = StoredAdapter.model_validate_json((folder / _RECORD_FILE).read_bytes())
            used_at = (folder / _RECORD_FILE).stat().st_mtime
            stamps = tuple(_stamp(folder / name) for name in (MODEL_FILE, CONFIG_FILE))
            if self._checked.get(adapter_id) != stamps:
                for name in (MODEL_FILE, CONFIG_FILE):
                    if hashlib.sha256((folder / name).read_bytes()).hexdigest() != adapter.sha256[name]:
                        raise ValueError(f"{name} is not the file that was written")
                self._checked[adapter_id] = stamps
        except FileNotFoundError as error:
            if not folder.is_dir():
                raise _not_found(adapter_id) from None
            self._quarantine(adapter_id, f"{Path(error.filename).name} is missing")
            raise _not_found(adapter_id) from None
        except (ValidationError, ValueError, KeyError) as error:
            self._quarantine(adapter_id, " ".join(str(error).split()))
            raise _not_found(adapter_id) from None
        if self._ttl_s is not None and time.time() - used_at > self._ttl_s and not self._holders(adapter_id):
            raise _not_found(adapter_id)
        return adapter

    def use(self, adapter_id: str) -> StoredAdapter:
        """Return an adapter's metadata like `get`, and note that it was used.

        Raises:
            NotFound: see `get`.
        """
        adapter = self.get(adapter_id)
        with suppress(FileNotFoundError):
            os.utime(self._folder(adapter_id) / _RECORD_FILE)
        return adapter

    def page(self, *, after: str | None, limit: int) -> list[StoredAdapter]:
        """Return up to `limit` adapters in ascending order of id, starting with the first id above `after`."""
        found: list[StoredAdapter] = []
        for adapter_id in sorted(self._ids()):
            if after is not None and adapter_id <= after:
                continue
            if len(found) == limit:
                break
            with suppress(NotFound):  # Deleted since the folder was listed, expired, or damaged.
                found.append(self.get(adapter_id))
        return found

    def open(self, adapter_id: str, name: str) -> tuple[StoredAdapter, BinaryIO]:
        """Return an adapter's metadata and one of its two files, which remains readable if the adapter is deleted.

        Raises:
            NotFound: see `get`.
        """
        adapter = self.use(adapter_id)
        try:
            return adapter, (self._folder(adapter_id) / name).open("rb")
        except FileNotFoundError:
            raise _not_found(adapter_id) from None

    def put(
        self, adapter_id: str, files: AdapterFiles, *, bundle: Bundle, prompt_tokens: int, novelty: Novelty | None
    ) -> StoredAdapter:
        """Store an adapter atomically, and evict the least recently used ones if the store is full.

        Raises:
            StorageError: a file operation failed, or all of a full store's adapters are leased.
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
        with self._changing:
            self._make_room(len(files.model))
            with new_directory(self._folder(adapter_id), durable=False) as temporary:
                (temporary / MODEL_FILE).write_bytes(files.model)
                (temporary / CONFIG_FILE).write_bytes(files.config)
                (temporary / _RECORD_FILE).write_text(adapter.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return adapter

    def delete(self, adapter_id: str) -> None:
        """Remove an adapter.

        Raises:
            NotFound: there is no adapter with this id.
            Conflict: it is leased.
            StorageError: a file operation failed; the adapter still exists.
        """
        with self._changing:
            if holders := self._holders(adapter_id):
                raise Conflict(
                    f"adapter {adapter_id} is leased by {', '.join(holders)}; end the leases, or wait until they end"
                )
            try:
                self._remove(adapter_id)
            except FileNotFoundError:
                raise _not_found(adapter_id) from None
            except OSError as error:
                raise StorageError(
                    f"could not delete adapter {adapter_id}: {error.strerror}; check the store's folder"
                ) from error

    def lease(self, adapter_id: str, holder: str, *, ttl_s: float) -> Lease:
        """Keep an adapter from being evicted or deleted for `ttl_s` seconds; a repeated call renews the lease.

        Raises:
            NotFound: see `get`.
            StorageError: a file operation failed.
        """
        ends_at = time.time() + ttl_s
        path = self._root / _LEASES / adapter_id / holder
        with self._changing:  # No eviction comes between finding the adapter and writing the lease.
            self.use(adapter_id)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                os.utime(path, (ends_at, ends_at))
            except OSError as error:
                raise StorageError(f"could not keep a lease in {path.parent}: {error.strerror}") from error
        return Lease(holder=holder, expires_at=datetime.fromtimestamp(ends_at, UTC))

    def release(self, adapter_id: str, holder: str) -> None:
        """End a lease; without one, nothing happens."""
        self._folder(adapter_id)  # The pattern keeps the path inside the store.
        (self._root / _LEASES / adapter_id / holder).unlink(missing_ok=True)

    def _holders(self, adapter_id: str) -> list[str]:
        """Return who holds a lease that has not ended; leases that have ended are removed."""
        folder = self._root / _LEASES / self._folder(adapter_id).name
        found = []
        with suppress(FileNotFoundError):
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if entry.stat().st_mtime > time.time():
                    found.append(entry.name)
                else:
                    Path(entry.path).unlink(missing_ok=True)
        return found

    def _make_room(self, num_bytes: int) -> None:
        """Evict expired adapters, then the least recently used ones, until `num_bytes` fit.

        Raises:
            StorageError: they do not fit.
        """
        used: list[tuple[float, int, str]] = []
        for adapter_id in self._ids():
            with suppress(FileNotFoundError):
                folder = self._root / adapter_id
                used.append(((folder / _RECORD_FILE).stat().st_mtime, (folder / MODEL_FILE).stat().st_size, adapter_id))
        total = sum(size for _, size, _ in used)
        for used_at, size, adapter_id in sorted(used):
            is_expired = self._ttl_s is not None and time.time() - used_at > self._ttl_s
            if not is_expired and total + num_bytes <= self._max_bytes:
                break
            if self._holders(adapter_id):
                continue
            with suppress(FileNotFoundError):  # Another process evicted it.
                self._remove(adapter_id)
                _log.info("adapter evicted", id=adapter_id, bytes=size)
            total -= size
        if total + num_bytes > self._max_bytes:
            raise StorageError(
                f"the adapter has {num_bytes:,} bytes, and {total:,} of the store's {self._max_bytes:,} bytes (--max-store-mib) "
                "are taken by adapters that are leased; end leases, or raise the limit"
            )

    def _remove(self, adapter_id: str) -> None:
        retired = self._root / f"{_RETIRED_PREFIX}{uuid.uuid4().hex}"
        # Renamed first, so that no reader sees a partially deleted adapter.
        self._folder(adapter_id).rename(retired)
        self._checked.pop(adapter_id, None)
        shutil.rmtree(retired, ignore_errors=True)
        shutil.rmtree(self._root / _LEASES / adapter_id, ignore_errors=True)

    def _quarantine(self, adapter_id: str, why: str) -> None:
        """Move a damaged adapter out of the way; it stays on disk so that the cause can be looked for."""
        quarantine = self._root / f"{_DAMAGED_PREFIX}{adapter_id}-{uuid.uuid4().hex[:8]}"
        with suppress(FileNotFoundError):
            self._folder(adapter_id).rename(quarantine)
            _log.warning(
                "damaged adapter quarantined; it is made again when it is asked for",
                id=adapter_id,
                folder=str(quarantine),
                why=why,
            )
        self._checked.pop(adapter_id, None)

    def _ids(self) -> list[str]:
        return [entry.name for entry in os.scandir(self._root) if re.fullmatch(ID_PATTERN, entry.name)]

    def _folder(self, adapter_id: str) -> Path:
        if not re.fullmatch(ID_PATTERN, adapter_id):
            raise NotFound("there is no such adapter: an id is 64 hexadecimal digits; GET /v1/adapters lists them")
        return self._root / adapter_id


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _not_found(adapter_id: str) -> NotFound:
    return NotFound(f"there is no adapter {adapter_id}; GET /v1/adapters lists all adapters")


def _hold(root: Path) -> int:
    """Take a shared lock on the store, after removing leftovers if nobody else has one."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise ConfigError(f"cannot keep adapters in {root}: it is not writable; choose another --store")
        with suppress(BlockingIOError):
            lock = open_locked(root, exclusive=True)
            for path in root.iterdir():
                if is_temporary(path) or path.name.startswith(_RETIRED_PREFIX):
                    shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
        return open_locked(root, exclusive=False, wait_s=10)
    except OSError as error:
        raise ConfigError(f"cannot keep adapters in {root}: {error.strerror}; choose another --store") from error
