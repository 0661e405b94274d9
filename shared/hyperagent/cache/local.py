"""The cache: a teacher's top-k rows on disk, which are the truth, and copies of them in an optional hot tier.

    ROOT/manifest.json           format version, the identity of the teacher, how rows are stored
    ROOT/data/<fingerprint>.json identity of data that trajectories were put in of
    ROOT/shards/<name>.shard     records, sealed; <name>.open is one that grows
    ROOT/index.sqlite            where each record stands; it can be made again from the shards
    ROOT/readers.lock            held shared by whoever reads, so that nothing is removed under it

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
    """A teacher's top-k rows by trajectory; safe to use from several threads and processes of one machine."""

    def __init__(
        self, root: Path, manifest: Manifest, *, hot: HotTier | None = None, shard_bytes: int, exclusive: bool = False
    ) -> None:
        """Use `create_or_open` or `open`."""
        super().__init__(str(root), manifest, hot)
        self.root = root
        self.shards = root / "shards"
        self.shard_bytes = shard_bytes
        self._lock = hold(root / "readers.lock", exclusive=exclusive)
        try:
            self.index = open_index(root, manifest.identity.fingerprint)
            """For the tools that look after a cache."""
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
        """The cache of one teacher, made if it is not there.

        Args:
            settings: how rows are to be stored; what it does not set is as in the cache, or the default of a new one.
            shard_bytes: size from which a shard is sealed.

        Raises:
            ConfigError: the cache stores rows in another way than `settings` says.
            IdentityMismatch: the cache holds another teacher's rows.
            StorageError: the file system refused.
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
        """An existing cache.

        Args:
            exclusive: keep everybody else from opening it, in order to remove something.

        Raises:
            ConfigError: there is none, or it is of an unknown format version.
            Conflict: somebody has it open exclusively, or, with `exclusive`, somebody has it open.
            CorruptRecord: its manifest is damaged.
            StorageError: the file system refused.
        """
        return cls(root, read_manifest(root), hot=hot, shard_bytes=SHARD_BYTES, exclusive=exclusive)

    def close(self) -> None:
        """Let go of all files, and of the hot tier."""
        super().close()
        self._writer.close()
        self.reader.close()
        self.index.close()
        os.close(self._lock)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the folder for itself."""
        return _reopen, (self.root, self._hot)

    def record_data(self, data: DataIdentity) -> None:
        """Write down that trajectories of `data` are put in.

        Raises:
            StorageError: the file system refused.
        """
        path = self._data_path(data.fingerprint)
        if not path.exists():
            write_atomically(path, data.to_json() + b"\n")

    def data_fingerprints(self) -> list[str]:
        """See `CacheReader.data_fingerprints`."""
        return sorted(path.stem for path in (self.root / "data").glob("*.json") if not is_temporary(path))

    def data_identities(self) -> list[DataIdentity]:
        """Identities of all data that trajectories were put in of.

        Raises:
            CorruptRecord: one is damaged.
            StorageError: the file system refused.
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
        """Begin, or go on, to put a trajectory in: ask the teacher for its rows from `TrajectoryWriter.first_row` on."""
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
        """Put one whole trajectory in; what is there already stays.

        Returns:
            The trajectory's key.

        Raises:
            InvalidRequest: the rows are not distributions over this teacher's vocabulary, or not of its top k.
            StorageError: the file system refused; the trajectory is not there.
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
        """Append whole records, and have the index name them in the place of what has their keys.

        Raises:
            StorageError: the file system refused; the index names what it did.
        """
        self._writer.write(records, again=True)

    def seal(self) -> None:
        """Seal the shard that this process writes, full or not."""
        self._writer.seal()

    def release_shard(self) -> None:
        """Give up the shard that this process writes; the next writer continues it."""
        self._writer.close()

    def _first_missing(self, blocks: Sequence[BlockPlan]) -> int:
        for number, block in enumerate(blocks):
            try:
                self._read_one(block.key)
            except NotFound:
                return number
            except CorruptRecord as error:
                log.warning("damaged record will be written again", reason=str(error))
                return number
        return len(blocks)

    def write_records(self, records: Sequence[bytes]) -> None:
        """Make whole records durable; those that are there already stay as they are.

        Raises:
            StorageError: the file system refused; none of them is there.
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
                # Compaction has moved it, and has deleted the shard it was in.
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
