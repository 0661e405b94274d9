"""Read-only cache in an object store, or in any other file system that fsspec supports.

    URL/manifest.json, URL/data/<fingerprint>.json, URL/shards/<name>.shard      as in a local cache

There is no index: the shards' footers give the location of each record, and records are fetched by byte ranges, those
of one trajectory together. A folder on a read-only file system can be read this way too (file:///path).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import fsspec
import numpy as np

from hyperagent.cache.base import CacheReader
from hyperagent.cache.format.manifest import Manifest, parse_manifest, read_manifest
from hyperagent.cache.format.record import Header, Kind, check_record
from hyperagent.cache.format.shard import SEALED, parse_footer
from hyperagent.cache.hot_tier import HotTier
from hyperagent.cache.local import LocalCache
from hyperagent.errors import ConfigError, CorruptRecord, NotFound, StorageError
from hyperagent.identity import TeacherIdentity


class RemoteCache(CacheReader):
    """Read a published cache by its URL, such as "s3://bucket/cache" or "file:///mnt/cache"."""

    def __init__(self, url: str, files: fsspec.AbstractFileSystem, folder: str, hot: HotTier | None) -> None:
        """Initialize from parsed footers; use `open` instead."""
        super().__init__(url, _manifest(url, files, folder), hot)
        self._files = files
        with storage_errors(url):
            # Fingerprints are stored as file names: listing them needs a single request.
            self._data = sorted(Path(name).stem for name in files.glob(f"{folder}/data/*.json"))
            self._shards = sorted(files.glob(f"{folder}/shards/*{SEALED}"))
            self._footers = [self._footer(path) for path in self._shards]

    @classmethod
    def open(cls, url: str, *, hot: HotTier | None = None) -> Self:
        """Read a published cache's manifest and footers.

        Raises:
            ConfigError: there is no cache, or the package for the URL's protocol is not installed.
            CorruptRecord: its manifest or a shard's footer is damaged.
            StorageError: an operation of the store failed.
        """
        files, folder = open_file_system(url)
        return cls(url, files, folder, hot)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the URL and the hot tier's settings only; another process opens the cache again."""
        return _reopen, (self.name, self._hot)

    def trajectory_keys(self) -> list[str]:
        """See `CacheReader.trajectory_keys`."""
        keys = {key for footer in self._footers for key in footer["key"][footer["kind"] == Kind.TRAJECTORY].tolist()}
        return sorted(key.hex() for key in keys)

    def data_fingerprints(self) -> list[str]:
        """See `CacheReader.data_fingerprints`."""
        return self._data

    def contains(self, key: str) -> bool:
        """See `CacheReader.contains`; the shards' footers are the index."""
        return self._find(bytes.fromhex(key)) is not None

    def _read(self, keys: Sequence[bytes]) -> Iterator[tuple[Header, memoryview]]:
        at = [self._at(key) for key in keys]
        with storage_errors(self.name):
            contents = self._files.cat_ranges(
                [path for path, _, _ in at], [start for _, start, _ in at], [end for _, _, end in at], on_error="raise"
            )
        for key, (path, start, _), content in zip(keys, at, contents, strict=True):
            whole = memoryview(content)
            try:
                header, _ = check_record(whole)
                if header.key != key:
                    raise CorruptRecord(f"it is the record of another key, {header.key.hex()}")
            except CorruptRecord as error:
                raise CorruptRecord(
                    f"record {key.hex()} in {path} at byte {start} is damaged: {error}; publish the cache again"
                ) from error
            yield header, whole

    def _read_again(self, key: bytes) -> tuple[Header, memoryview]:
        # No record is kept in memory between reads, so every read is a fresh one.
        return self._read_one(key)

    def _at(self, key: bytes) -> tuple[str, int, int]:
        if (at := self._find(key)) is None:
            raise NotFound(f"the cache in {self.name} has no record {key.hex()}; populate it, and publish it again")
        return at

    def _find(self, key: bytes) -> tuple[str, int, int] | None:
        """Return a record's shard, start and end offset; of several records, the first in the order of shard names."""
        for path, footer in zip(self._shards, self._footers, strict=True):
            place = int(np.searchsorted(footer["key"].view("S32"), np.bytes_(key)))
            if place < len(footer) and bytes(footer["key"][place]) == key:
                start = int(footer["offset"][place])
                return path, start, start + int(footer["length"][place])
        return None

    def _footer(self, path: str) -> np.ndarray[Any, np.dtype[np.void]]:
        try:
            footer, _ = parse_footer(
                lambda start, end: self._files.cat_file(path, start=start, end=end), int(self._files.size(path))
            )
        except CorruptRecord as error:
            raise CorruptRecord(f"{path} is damaged: {error}; publish the cache again") from error
        return footer


def open_for_reading(location: str | Path, *, hot: HotTier | None = None) -> CacheReader:
    """Open a published cache if `location` is a URL, otherwise the local cache in that folder.

    Raises:
        See `RemoteCache.open` and `LocalCache.open`.
    """
    if "://" in str(location):
        return RemoteCache.open(str(location), hot=hot)
    return LocalCache.open(Path(location), hot=hot)


def read_identity(location: str | Path) -> TeacherIdentity:
    """Read the identity of the teacher of a cache from its manifest alone.

    Raises:
        ConfigError: there is no cache, or the package for the URL's protocol is not installed.
        CorruptRecord: its manifest is damaged.
        StorageError: an operation of the store or the file system failed.
    """
    if "://" in str(location):
        return _manifest(str(location), *open_file_system(str(location))).identity
    return read_manifest(Path(location)).identity


def has_manifest(files: fsspec.AbstractFileSystem, folder: str) -> bool:
    """Return whether a cache is published in `folder`."""
    return bool(files.exists(f"{folder}/manifest.json"))


def _manifest(url: str, files: fsspec.AbstractFileSystem, folder: str) -> Manifest:
    with storage_errors(url):
        if not has_manifest(files, folder):
            raise ConfigError(f"there is no cache in {url}; put one there with `hyperagent cache publish`")
        content = files.cat_file(f"{folder}/manifest.json")
    return parse_manifest(content, url)


def open_file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of `url` and the path in it.

    Raises:
        ConfigError: the package for the URL's protocol is not installed.
    """
    try:
        files, folder = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{url} cannot be opened: {error}") from error
    return files, str(folder).rstrip("/")


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn an `OSError` of the store into a `StorageError` that names the URL."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"could not reach {url}: {error.strerror or error}; check the address and your access rights"
        ) from error


def _reopen(url: str, hot: HotTier | None) -> RemoteCache:
    return RemoteCache.open(url, hot=hot)
