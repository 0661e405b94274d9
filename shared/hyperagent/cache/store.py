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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import structlog
from blake3 import blake3
from numpy.typing import NDArray

from hyperagent.cache.capture import Capture
from hyperagent.cache.hot import HotTier
from hyperagent.cache.keys import BlockPlan, plan_blocks, trajectory_key
from hyperagent.cache.locks import hold
from hyperagent.cache.manifest import CacheSettings, Manifest, manifest_path, read_manifest, write_manifest
from hyperagent.cache.reader import ShardReader
from hyperagent.cache.rebuild import open_index
from hyperagent.cache.record import (
    BlockOfTrajectory,
    Header,
    Kind,
    StoredRows,
    check_record,
    decode_block,
    decode_trajectory,
)
from hyperagent.cache.rows import to_top_k_rows
from hyperagent.cache.shard import Location
from hyperagent.cache.writer import SHARD_BYTES, RecordWriter
from hyperagent.errors import ConfigError, CorruptRecord, IdentityMismatch, NotFound, StorageError
from hyperagent.files import is_aside, write_atomically
from hyperagent.identity import DataIdentity, TeacherIdentity, require_same
from hyperagent.topk import TopKRows, concatenate

_DIGEST_DOMAIN = b"hyperagent-topk-digest-2"
log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class CachedRecord:
    """What the cache holds of one trajectory."""

    rows: TopKRows
    num_tokens: int
    """Tokens of the trajectory, context included."""


@dataclass(frozen=True)
class StoredTrajectory:
    """What a trajectory consists of."""

    key: str
    num_tokens: int
    num_rows: int
    blocks: tuple[BlockOfTrajectory, ...]


class TopKCache:
    """A teacher's top-k rows by trajectory; safe to use from several threads and processes of one machine."""

    def __init__(
        self, root: Path, manifest: Manifest, *, hot: HotTier | None = None, shard_bytes: int, alone: bool = False
    ) -> None:
        """Use `create_or_open` or `open`."""
        self.root = root
        self.identity = manifest.identity
        self.settings = manifest.settings
        self._hot = hot
        self._settings_digest = manifest.settings.digest()[:16]
        self.shards = root / "shards"
        self.shard_bytes = shard_bytes
        self._lock = hold(root / "readers.lock", alone=alone)
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
    def open(cls, root: Path, *, hot: HotTier | None = None, alone: bool = False) -> Self:
        """An existing cache.

        Args:
            alone: keep everybody else from opening it, to remove something.

        Raises:
            ConfigError: there is none, or it is of an unknown format version.
            Conflict: somebody has it open alone, or, to be alone, at all.
            CorruptRecord: its manifest is damaged.
            StorageError: the file system refused.
        """
        return cls(root, read_manifest(root), hot=hot, shard_bytes=SHARD_BYTES, alone=alone)

    def close(self) -> None:
        """Let go of all files, and of the hot tier."""
        if self._hot:
            self._hot.close()
        self._writer.close()
        self.reader.close()
        self.index.close()
        os.close(self._lock)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the folder for itself."""
        return _reopen, (self.root, self._hot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record_data(self, data: DataIdentity) -> None:
        """Write down that trajectories of `data` are put in.

        Raises:
            StorageError: the file system refused.
        """
        path = self._data_path(data.fingerprint)
        if not path.exists():
            write_atomically(path, data.to_json() + b"\n")

    def data_fingerprints(self) -> list[str]:
        """Fingerprints of all data that trajectories were put in of."""
        return sorted(path.stem for path in (self.root / "data").glob("*.json") if not is_aside(path))

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

    def require_data(self, data: DataIdentity) -> None:
        """Refuse data that the cache was not populated from.

        Raises:
            IdentityMismatch: it was not; says of what it was.
        """
        if not self._data_path(data.fingerprint).exists():
            raise IdentityMismatch(
                f"the cache in {self.root} was not populated from data {data.fingerprint} but from "
                f"{', '.join(self.data_fingerprints()) or 'none'}; run `hyperagent cache populate` with this tokens file"
            )

    def key(self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32]) -> str:
        """Digest (hex) of all that decides a trajectory: the teacher, the tokens [T], the supervised positions [N]."""
        return trajectory_key(self.identity.fingerprint, token_ids, positions)

    def contains(self, key: str) -> bool:
        """Whether a whole trajectory is on disk; a damaged one does not count, so populating again mends it."""
        return self.stored_digest(key) is not None

    def stored_digest(self, key: str) -> str | None:
        """Digest (hex) of a whole trajectory on disk; None where there is none, or a damaged one."""
        try:
            trajectory = self.trajectory(key)
            digest = blake3(_DIGEST_DOMAIN + bytes.fromhex(key) + trajectory.num_tokens.to_bytes(8, "little"))
            for block in trajectory.blocks:
                digest.update(block.key + self._read(block.key)[0].checksum)
        except NotFound:
            return None
        except CorruptRecord as error:
            log.warning("damaged record will be written again", trajectory=key, reason=str(error))
            return None
        return digest.hexdigest()

    def capture(self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32]) -> Capture:
        """Begin, or go on, to put a trajectory in: ask the teacher for its rows from `Capture.first_row` on."""
        manifest = Manifest(self.identity, self.settings)
        blocks = list(
            plan_blocks(self.identity.fingerprint, token_ids, positions, block_tokens=self.settings.block_tokens)
        )
        return Capture(
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

    def trajectory(self, key: str) -> StoredTrajectory:
        """What one trajectory consists of.

        Raises:
            NotFound: there is none.
            CorruptRecord: its record is damaged; says which and how to mend it.
            StorageError: the file system refused.
        """
        header, payload = self._read(bytes.fromhex(key))
        return StoredTrajectory(key, header.num_tokens, header.num_rows, decode_trajectory(header, payload))

    def rows_of(self, block_keys: Sequence[bytes]) -> Iterator[StoredRows]:
        """Blocks' rows as they are stored, from the hot tier where it has them.

        Raises:
            NotFound: there is no such block.
            CorruptRecord: it is damaged; says which and how to mend it.
            StorageError: the file system refused.
        """
        for header, payload in self.records_of(block_keys):
            yield decode_block(header, payload, vocab_size=self.identity.vocab_size)

    def records_of(self, block_keys: Sequence[bytes]) -> Iterator[tuple[Header, memoryview]]:
        """Blocks' records, for who decodes them elsewhere; from the hot tier where it has them.

        Raises:
            As `rows_of`.
        """
        copies = self._hot.get([self._hot_name(key) for key in block_keys]) if self._hot else [None] * len(block_keys)
        for key, copy in zip(block_keys, copies, strict=True):
            yield (copy and self._checked_copy(key, copy)) or self._read_into_hot(key)

    def get(self, key: str) -> CachedRecord:
        """Read one trajectory.

        Raises:
            NotFound: there is none.
            CorruptRecord: it is damaged; says which and how to mend it.
            StorageError: the file system refused.
        """
        trajectory = self.trajectory(key)
        parts = self.rows_of([block.key for block in trajectory.blocks])
        return CachedRecord(
            concatenate([to_top_k_rows(part, self.identity.top_k) for part in parts]), trajectory.num_tokens
        )

    def record(self, key: bytes) -> bytes:
        """A whole record as it is on disk, checked.

        Raises:
            As `rows_of`.
        """
        return self.reader.content(self._at(key), key)

    def trajectory_keys(self) -> list[str]:
        """Every trajectory on disk, by its key, sorted."""
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
        """Give up the shard that this process writes; the next writer goes on with it."""
        self._writer.close()

    def _first_missing(self, blocks: Sequence[BlockPlan]) -> int:
        for number, block in enumerate(blocks):
            try:
                self._read(block.key)
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

    def _read(self, key: bytes) -> tuple[Header, memoryview]:
        at = self._at(key)
        try:
            return self.reader.read(at, key)
        except NotFound:
            # Compaction has moved it, and has deleted the shard it was in.
            return self.reader.read(self._at(key), key)

    def _read_into_hot(self, key: bytes) -> tuple[Header, memoryview]:
        header, payload = self._read(key)
        if self._hot:
            self._hot.put({self._hot_name(key): self.reader.content(self._at(key), key)})
        return header, payload

    def _checked_copy(self, key: bytes, copy: bytes) -> tuple[Header, memoryview] | None:
        assert self._hot is not None
        try:
            header, payload = check_record(memoryview(copy))
            if header.key != key:
                raise CorruptRecord(f"it is the record of another key, {header.key.hex()}")
        except CorruptRecord as error:
            log.warning("damaged value in the hot tier dropped", key=key.hex(), reason=str(error))
            self._hot.drop(self._hot_name(key))
            return None
        return header, payload

    def _hot_name(self, key: bytes) -> str:
        # A key covers the teacher's fingerprint, and the name how rows are stored, so one Redis can serve many caches.
        return f"hyperagent:topk:{self._settings_digest}:{key.hex()}"

    def _at(self, key: bytes) -> Location:
        if (at := self.index.find(key)) is None:
            raise NotFound(f"the cache in {self.root} has no record {key.hex()}; run `hyperagent cache populate`")
        return at

    def _data_path(self, fingerprint: str) -> Path:
        return self.root / "data" / f"{fingerprint}.json"


def _reopen(root: Path, hot: HotTier | None) -> TopKCache:
    return TopKCache.open(root, hot=hot)
