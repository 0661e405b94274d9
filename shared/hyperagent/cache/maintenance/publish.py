"""Publish a cache to an object store, from which `hyperagent.cache.remote` reads it."""

from __future__ import annotations

from pathlib import Path

import fsspec

from hyperagent.cache.format.manifest import Manifest, manifest_path, parse_manifest
from hyperagent.cache.format.shard import SEALED, shard_paths
from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.compact import compact
from hyperagent.cache.remote import has_manifest, open_file_system, storage_errors
from hyperagent.errors import ConfigError, Conflict
from hyperagent.progress import Progress, no_progress

_UPLOAD_BYTES = 8 << 20


def publish(cache: LocalCache, url: str, progress: Progress = no_progress) -> int:
    """Compact and seal a cache's shards, copy files that `url` lacks, and return the number of bytes copied.

    The manifest is copied last, so a cache with a manifest is complete. A shard that compaction has replaced stays at
    `url`, which is harmless because its records are the same.

    Raises:
        ConfigError: another cache is published there.
        Conflict: another process writes to the cache, so the published copy would be incomplete.
        StorageError: an operation of the store or the file system failed; a rerun continues.
    """
    files, folder = open_file_system(url)
    manifest = manifest_path(cache.root).read_bytes()
    with storage_errors(url):
        there = files.cat_file(f"{folder}/{manifest_path(cache.root).name}") if has_manifest(files, folder) else None
    if there is not None and parse_manifest(there, url) != Manifest(cache.identity, cache.settings):
        raise ConfigError(f"another cache is published at {url}; choose another address")
    compact(cache)
    shards = shard_paths(cache.shards)
    if growing := [path.name for path in shards if path.suffix != SEALED]:
        raise Conflict(f"another process writes to {cache.root} ({growing[0]}); publish when it has finished")
    total, done, copied = sum(path.stat().st_size for path in shards), 0, 0
    with storage_errors(url):
        files.makedirs(f"{folder}/shards", exist_ok=True)
        files.makedirs(f"{folder}/data", exist_ok=True)
        for path in shards:
            target, size = f"{folder}/shards/{path.name}", path.stat().st_size
            # A sealed shard never changes, and an interrupted upload is shorter, so comparing sizes is enough.
            if not files.exists(target) or files.size(target) != size:
                _upload(path, files, target)
                copied += size
            done += size
            progress(done, total)
        for fingerprint in cache.data_fingerprints():
            name = f"data/{fingerprint}.json"
            files.pipe_file(f"{folder}/{name}", (cache.root / name).read_bytes())
        files.pipe_file(f"{folder}/{manifest_path(cache.root).name}", manifest)
    return copied


def _upload(path: Path, files: fsspec.AbstractFileSystem, target: str) -> None:
    with path.open("rb") as source, files.open(target, "wb") as sink:
        while part := source.read(_UPLOAD_BYTES):
            sink.write(part)
