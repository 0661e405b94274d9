"""Interface for reading a cache, local or remote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import structlog
from blake3 import blake3
from numpy.typing import NDArray

from hyperagent.cache.format.convert import decode_rows, to_top_k_rows
from hyperagent.cache.format.keys import trajectory_key
from hyperagent.cache.format.manifest import Manifest
from hyperagent.cache.format.record import (
    BlockOfTrajectory,
    Header,
    StoredRows,
    check_record,
    decode_trajectory,
)
from hyperagent.cache.hot_tier import HotTier, HotTierStats
from hyperagent.errors import CorruptRecord, IdentityMismatch, NotFound
from hyperagent.identity import DataIdentity
from hyperagent.topk import TopKRows, concatenate

_DIGEST_DOMAIN = b"hyperagent-topk-digest-2"
log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class CachedRecord:
    """Cached rows of one trajectory."""

    rows: TopKRows
    num_tokens: int
    """Number of tokens in the trajectory, context included."""


@dataclass(frozen=True)
class StoredTrajectory:
    """Stored description of a trajectory: its sizes and its blocks."""

    key: str
    num_tokens: int
    num_rows: int
    blocks: tuple[BlockOfTrajectory, ...]


class CacheReader(ABC):
    """Read a teacher's top-k rows by trajectory; thread-safe and picklable."""

    def __init__(self, name: str, manifest: Manifest, hot: HotTier | None) -> None:
        """Initialize the state shared by subclasses; `name` is the folder or the address shown in messages."""
        self.name = name
        self.identity = manifest.identity
        self.settings = manifest.settings
        self._hot = hot
        self._settings_digest = manifest.settings.digest()[:16]

    @abstractmethod
    def trajectory_keys(self) -> list[str]:
        """Return the sorted keys (hex) of all trajectories in the cache."""

    @abstractmethod
    def data_fingerprints(self) -> list[str]:
        """Return the fingerprints of the datasets this cache was populated from, sorted."""

    @abstractmethod
    def _read(self, keys: Sequence[bytes]) -> Iterator[tuple[Header, memoryview]]:
        """Yield the headers and bytes of whole records after checking them; raises as `rows_of`."""

    @abstractmethod
    def _read_again(self, key: bytes) -> tuple[Header, memoryview]:
        """Read and check one record even if this process has checked it before; raises as `rows_of`."""

    @property
    def hot_tier_stats(self) -> HotTierStats:
        """Hits and misses of the hot tier in this process; all zeros without a hot tier."""
        return self._hot.use if self._hot else HotTierStats()

    def close(self) -> None:
        """Close everything that is open, including the hot tier."""
        if self._hot:
            self._hot.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_data(self, data: DataIdentity) -> None:
        """Require that the cache was populated from `data`.

        Raises:
            IdentityMismatch: it was populated from other data; the message names it.
        """
        if data.fingerprint not in self.data_fingerprints():
            raise IdentityMismatch(
                f"the cache in {self.name} was not populated from data {data.fingerprint} but from "
                f"{', '.join(self.data_fingerprints()) or 'none'}; run `hyperagent cache populate` with this tokens file"
            )

    def key(self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32]) -> str:
        """Return the digest (hex) that identifies a trajectory: teacher, tokens [T] and supervised positions [N]."""
        return trajectory_key(self.identity.fingerprint, token_ids, positions)

    @abstractmethod
    def contains(self, key: str) -> bool:
        """Return whether the index lists the trajectory `key` (hex); no record is read, so damage is not noticed.

        A trajectory is added to the index after its blocks, so a listed trajectory has all of them.
        """

    def is_intact(self, key: str) -> bool:
        """Return whether the trajectory `key` (hex) is complete and undamaged; every byte of its records is checked.

        Raises:
            StorageError: reading from the storage failed.
        """
        return self.stored_digest(key) is not None

    def stored_digest(self, key: str) -> str | None:
        """Return the digest (hex) of the trajectory `key` (hex), or None if it is not intact.

        Every byte is read from the storage again, even if this process has checked it before.

        Raises:
            StorageError: reading from the storage failed.
        """
        try:
            header, content = self._read_again(bytes.fromhex(key))
            digest = blake3(_DIGEST_DOMAIN + bytes.fromhex(key) + header.num_tokens.to_bytes(8, "little"))
            for block in decode_trajectory(header, header.payload(content)):
                digest.update(block.key + self._read_again(block.key)[0].checksum)
        except NotFound:
            return None
        except CorruptRecord as error:
            log.warning("damaged trajectory", trajectory=key, reason=str(error))
            return None
        return digest.hexdigest()

    def trajectory(self, key: str) -> StoredTrajectory:
        """Return the sizes and the blocks of one trajectory.

        Raises:
            NotFound: the cache has no such trajectory.
            CorruptRecord: its record is damaged; the message says which and how to restore it.
            StorageError: reading from the file system failed.
        """
        header, content = self._read_one(bytes.fromhex(key))
        blocks = decode_trajectory(header, header.payload(content))
        return StoredTrajectory(key, header.num_tokens, header.num_rows, blocks)

    def rows_of(self, block_keys: Sequence[bytes]) -> Iterator[StoredRows]:
        """Yield the rows of blocks as stored; records in the hot tier are not read from storage.

        Raises:
            NotFound: the cache has no such block.
            CorruptRecord: a record is damaged; the message says which and how to restore it.
            StorageError: reading from the file system failed.
        """
        for header, payload in self.records_of(block_keys):
            yield decode_rows(header, payload, self.identity)

    def records_of(self, block_keys: Sequence[bytes]) -> Iterator[tuple[Header, memoryview]]:
        """Yield the headers and payloads of blocks without decoding them; uses the hot tier where it has them.

        Raises:
            As `rows_of`.
        """
        found = self._copies(block_keys)
        missing = self._read([key for key, copy in zip(block_keys, found, strict=True) if copy is None])
        for copy in found:
            header, content = copy or next(missing)
            if copy is None and self._hot:
                self._hot.put({self._hot_name(header.key): bytes(content)})
            yield header, header.payload(content)

    def get(self, key: str) -> CachedRecord:
        """Read one trajectory.

        Raises:
            NotFound: the cache has no such trajectory.
            CorruptRecord: a record is damaged; the message says which and how to restore it.
            StorageError: reading from the file system failed.
        """
        trajectory = self.trajectory(key)
        parts = self.rows_of([block.key for block in trajectory.blocks])
        return CachedRecord(
            concatenate([to_top_k_rows(part, self.identity.top_k) for part in parts]), trajectory.num_tokens
        )

    def record(self, key: bytes) -> bytes:
        """Return the bytes of a whole record after checking them.

        Raises:
            As `rows_of`.
        """
        return bytes(self._read_one(key)[1])

    def _read_one(self, key: bytes) -> tuple[Header, memoryview]:
        (found,) = self._read([key])
        return found

    def _copies(self, keys: Sequence[bytes]) -> list[tuple[Header, memoryview] | None]:
        """Return the whole records that the hot tier has, and None for each one that it lacks."""
        if self._hot is None:
            return [None] * len(keys)
        copies = self._hot.get([self._hot_name(key) for key in keys])
        return [None if copy is None else self._checked_copy(key, copy) for key, copy in zip(keys, copies, strict=True)]

    def _checked_copy(self, key: bytes, copy: bytes) -> tuple[Header, memoryview] | None:
        assert self._hot is not None
        content = memoryview(copy)
        try:
            header, _ = check_record(content)
            if header.key != key:
                raise CorruptRecord(f"it is the record of another key, {header.key.hex()}")
        except CorruptRecord as error:
            log.warning("damaged value in the hot tier dropped", key=key.hex(), reason=str(error))
            self._hot.drop(self._hot_name(key))
            return None
        return header, content

    def _hot_name(self, key: bytes) -> str:
        # The key covers the teacher and the digest covers the storage settings, so one Redis can serve many caches.
        return f"hyperagent:topk:{self._settings_digest}:{key.hex()}"
