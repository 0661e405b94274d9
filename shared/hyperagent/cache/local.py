"""Local cache: a teacher's top-k rows on disk, with copies in an optional hot tier.

    ROOT/manifest.json           format version, the identity of the teacher, how rows are stored
    ROOT/data/<fingerprint>.json identity of a dataset that the cache was populated from
    ROOT/shards/<name>.shard     sealed records; <name>.open is a shard that is being written
    ROOT/index.sqlite            location of each record; can be rebuilt from the shards
    ROOT/readers.lock            lock shared by all readers, so that nothing is removed while they read

docs/cache-format.md specifies every byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import structlog
from numpy.typing import NDArray

from hyperagent.cache.base import CacheReader
from hyperagent.cache.format.keys import BlockPlan, plan_blocks
from hyperagent.cache.format.manifest import CacheSettings, Manifest, manifest_path, read_manifest, write_manifest
from hyperagent.cache.format.record import (
    Header,
    Kind,
)
from hyperagent.cache.format.shard import Location
from hyperagent.cache.hot_tier import HotTier
from hyperagent.cache.index_rebuild import open_index
from hyperagent.cache.locks import hold
from hyperagent.cache.shard_reader import ShardReader
from hyperagent.cache.trajectory_writer import TrajectoryWriter
from hyperagent.cache.writer import SHARD_BYTES, RecordWriter
from hyperagent.errors import ConfigError, CorruptRecord, NotFound, StorageError
from hyperagent.identity import DataIdentity, TeacherIdentity, require_same
from hyperagent.storage.files import is_temporary, write_atomically
from hyperagent.topk import TopKRows

log = structlog.get_logger()


class LocalCache(CacheReader):
    """Store and read a teacher's top-k rows by trajectory; safe for threads and processes of one machine."""

    def __init__(
        self, root: Path, manifest: Manifest, *, hot: HotTier | None = None, shard_bytes: int, exclusive: bool = False
    ) -> None:
        """Lock and open the parts of a cache; use `create_or_open` or `open` instead."""
        super().__init__(str(root), manifest, hot)
        self.root = root
        self.shards = root / "shards"
        self.shard_bytes = shard_bytes
        self._lock = hold(root / "readers.lock", exclusive=exclusive)
        try:
            self.index = open_index(root, manifest.identity.fingerprint)
            """Index of the cache, public for `hyperagent.cache.maintenance`."""
        except BaseException:
            os.close(self._lock)
            raise
        self.reader = ShardReader(self.shards)
        self._writer = RecordWriter(
            self.shards, manifest.identity.fingerprint, self.index, self.reader, shard_bytes=shard_bytes
        )

    @classmethod
    def create_or_open(
        cls,
        root: Path,
        identity: TeacherIdentity,
        *,
        settings: CacheSettings | None = None,
        hot: HotTier | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> Self:
        """Open the cache of one teacher; create it if it does not exist.

        Args:
            settings: storage settings; unset fields are taken from the cache, or are the defaults for a new one.
            shard_bytes: size from which a shard is sealed.

        Raises:
            ConfigError: `settings` differ from those of the cache.
            IdentityMismatch: the cache holds another teacher's rows.
            StorageError: a file operation failed.
        """
        if not manifest_path(root).exists():
            write_manifest(root, Manifest(identity, settings or CacheSettings()))
        manifest = read_manifest(root)
        # The display name is not part of a fingerprint: a model folder may be renamed.
        if manifest.identity.fingerprint != identity.fingerprint:
            require_same(
                f"the teacher of the cache in {root}",
                expected=manifest.identity,
                found=identity,
                remedy="give each teacher a cache folder of its own",
            )
        said = settings.model_dump(exclude_unset=True) if settings else {}
        if differing := {name: value for name, value in said.items() if value != getattr(manifest.settings, name)}:
            raise ConfigError(
                f"the cache in {root} stores rows with {manifest.settings}, not with {differing}; leave that out, name "
                "another folder, or bring this cache's rows into a new one with `hyperagent cache import`"
            )
        return cls(root, manifest, hot=hot, shard_bytes=shard_bytes)

    @classmethod
    def open(cls, root: Path, *, hot: HotTier | None = None, exclusive: bool = False) -> Self:
        """Open an existing cache.

        Args:
            exclusive: keep all other processes from opening the cache, so that records can be removed.

        Raises:
            ConfigError: there is no cache, or its format version is unknown.
            Conflict: it is open exclusively elsewhere or, with `exclusive`, it is open elsewhere.
            CorruptRecord: its manifest is damaged.
            StorageError: a file operation failed.
        """
        return cls(root, read_manifest(root), hot=hot, shard_bytes=SHARD_BYTES, exclusive=exclusive)

    def close(self) -> None:
        """Close all files and the hot tier."""
        super().close()
        self._writer.close()
        self.reader.close()
        self.index.close()
        os.close(self._lock)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the folder and the hot tier's settings only; another process opens the cache again."""
        return _reopen, (self.root, self._hot)

    def record_data(self, data: DataIdentity) -> None:
        """Record that the cache is populated from `data`.

        Raises:
            StorageError: a file operation failed.
        """
        path = self._data_path(data.fingerprint)
        if not path.exists():
            write_atomically(path, data.to_json() + b"\n")

    def data_fingerprints(self) -> list[str]:
        """See `CacheReader.data_fingerprints`."""
        return sorted(path.stem for path in (self.root / "data").glob("*.json") if not is_temporary(path))

    def data_identities(self) -> list[DataIdentity]:
        """Return the identities of the datasets this cache was populated from.

        Raises:
            CorruptRecord: an identity file is damaged.
            StorageError: a file operation failed.
        """
        found = []
        for path in map(self._data_path, self.data_fingerprints()):
            try:
                found.append(DataIdentity.from_json(path.read_bytes()))
            except OSError as error:
                raise StorageError(f"could not read {path}: {error.strerror}; check its permissions") from error
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptRecord(f"{path} is damaged; remove it, and populate from its tokens file again") from error
            if found[-1].fingerprint != path.stem:
                raise CorruptRecord(f"{path} is damaged; remove it, and populate from its tokens file again")
        return found

    def capture(self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32]) -> TrajectoryWriter:
        """Start or resume storing a trajectory; the teacher must supply rows from `TrajectoryWriter.first_row` on."""
        manifest = Manifest(self.identity, self.settings)
        blocks = list(
            plan_blocks(self.identity.fingerprint, token_ids, positions, block_tokens=self.settings.block_tokens)
        )
        return TrajectoryWriter(
            self.key(token_ids, positions),
            blocks,
            manifest,
            num_tokens=len(token_ids),
            first_missing=self._first_missing(blocks),
            write=self.write_records,
        )

    def put(self, token_ids: NDArray[np.uint32], rows: TopKRows) -> str:
        """Store one whole trajectory; blocks that the cache already has are kept.

        Returns:
            The trajectory's key.

        Raises:
            InvalidRequest: the rows are not distributions over this teacher's vocabulary, or have another top k.
            StorageError: a file operation failed; the trajectory is not stored.
        """
        capture = self.capture(token_ids, rows.positions)
        capture.add(rows.part(slice(capture.first_row, None)))
        capture.finish()
        return capture.key

    def contains(self, key: str) -> bool:
        """See `CacheReader.contains`."""
        return self.index.find(bytes.fromhex(key)) is not None

    def trajectory_keys(self) -> list[str]:
        """See `CacheReader.trajectory_keys`."""
        return [key.hex() for key in self.index.keys(Kind.TRAJECTORY)]

    def write_again(self, records: Sequence[bytes]) -> None:
        """Append whole records and make the index point to them instead of existing records with the same keys.

        Raises:
            StorageError: a file operation failed; the index is unchanged.
        """
        self._writer.write(records, again=True)

    def seal(self) -> None:
        """Seal the shard that this process writes, full or not."""
        self._writer.seal()

    def release_shard(self) -> None:
        """Close the shard that this process writes and release its lock; the next writer continues it."""
        self._writer.close()

    def _first_missing(self, blocks: Sequence[BlockPlan]) -> int:
        for number, block in enumerate(blocks):
            try:
                self._read_one(block.key)
            except NotFound:
                return number
            except CorruptRecord as error:
                log.warning("rewriting damaged record", reason=str(error))
                return number
        return len(blocks)

    def write_records(self, records: Sequence[bytes]) -> None:
        """Store whole records durably; existing records with the same keys stay unchanged.

        Raises:
            StorageError: a file operation failed; none of the new records is stored.
        """
        self._writer.write(records)
        if self._hot:
            headers = [Header.from_bytes(memoryview(record)) for record in records]
            blocks = zip(headers, records, strict=True)
            self._hot.put({self._hot_name(h.key): record for h, record in blocks if h.kind is Kind.BLOCK})

    def _read(self, keys: Sequence[bytes]) -> Iterator[tuple[Header, memoryview]]:
        for key in keys:
            at = self._at(key)
            try:
                found = self.reader.read(at, key)
            except NotFound:
                # Compaction has moved the record and deleted its old shard.
                found = self.reader.read(self._at(key), key)
            yield found

    def _read_again(self, key: bytes) -> tuple[Header, memoryview]:
        self.reader.forget(self._at(key))
        return self._read_one(key)

    def _at(self, key: bytes) -> Location:
        if (at := self.index.find(key)) is None:
            raise NotFound(f"the cache in {self.root} has no record {key.hex()}; run `hyperagent cache populate`")
        return at

    def _data_path(self, fingerprint: str) -> Path:
        return self.root / "data" / f"{fingerprint}.json"


def _reopen(root: Path, hot: HotTier | None) -> LocalCache:
    return LocalCache.open(root, hot=hot)
