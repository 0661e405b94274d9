"""The cache: content-addressed records on disk, which are the truth, and copies of them in an optional hot tier.

    ROOT/manifest.json           format version and the identity of the teacher that all records are of
    ROOT/data/<fingerprint>.json identity of data that trajectories were put in of
    ROOT/objects/ab/<key>.topk   one record per trajectory, in a folder named by the key's first two digits

A record is written aside and renamed, so it is there whole or not at all, and two writers of one key cannot hurt
each other. docs/cache-format.md specifies every byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import structlog
from blake3 import blake3
from numpy.typing import NDArray

from hyperagent.cache.codec import (
    FORMAT_VERSION,
    CachedRecord,
    cache_digest,
    decode_record,
    encode_record,
    record_digest,
)
from hyperagent.cache.hot import HotTier
from hyperagent.errors import ConfigError, CorruptRecord, IdentityMismatch, InvalidRequest, NotFound, StorageError
from hyperagent.files import is_aside, write_atomically, write_once
from hyperagent.identity import DataIdentity, TeacherIdentity, require_same
from hyperagent.topk import TopKRows

_KEY_DOMAIN = b"hyperagent-topk-key-1"
log = structlog.get_logger()


@dataclass(frozen=True)
class VerifyReport:
    """What checking every record found."""

    records: int
    """Records that are whole."""
    damaged: tuple[tuple[Path, str], ...]
    """Path and reason of each that is not; populating again mends it."""
    leftovers: tuple[Path, ...]
    """What killed writers left behind; harmless, and safe to delete while nobody writes."""
    digest: str
    """`cache_digest` of the whole records."""


@dataclass(frozen=True)
class CacheStats:
    """What the cache holds."""

    records: int
    supervised_tokens: int
    """Rows: tokens whose distribution is kept."""
    context_tokens: int
    """Tokens of all trajectories, supervised or not."""
    bytes: int
    """Of all records on disk."""
    top_k: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes per supervised token."""
        return self.bytes / self.supervised_tokens if self.supervised_tokens else 0.0


class TopKCache:
    """A teacher's top-k rows by trajectory; safe to use from several threads and processes."""

    def __init__(self, root: Path, identity: TeacherIdentity, hot: HotTier | None) -> None:
        """Use `create_or_open` or `open`."""
        self.root = root
        self.identity = identity
        self._hot = hot

    @classmethod
    def create_or_open(cls, root: Path, identity: TeacherIdentity, *, hot: HotTier | None = None) -> TopKCache:
        """The cache of one teacher, made if it is not there.

        Raises:
            IdentityMismatch: the cache holds another teacher's rows.
            StorageError: the file system refused.
        """
        if not _manifest_path(root).exists():
            manifest = {
                "format_version": FORMAT_VERSION,
                "identity": asdict(identity),
                "fingerprint": identity.fingerprint,
            }
            # Of two teachers that start at once one makes the cache, and the other is told below whose it is.
            write_once(_manifest_path(root), json.dumps(manifest, indent=2).encode() + b"\n")
        cache = cls.open(root, hot=hot)
        # The display name is not part of a fingerprint: a model folder may be renamed.
        if cache.identity.fingerprint != identity.fingerprint:
            require_same(
                f"the teacher of the cache in {root}",
                expected=cache.identity,
                found=identity,
                remedy="give each teacher a cache folder of its own",
            )
        return cache

    @classmethod
    def open(cls, root: Path, *, hot: HotTier | None = None) -> TopKCache:
        """An existing cache.

        Raises:
            ConfigError: there is none, or it is of an unknown format version.
            CorruptRecord: its manifest is damaged.
            StorageError: the file system refused.
        """
        path = _manifest_path(root)
        try:
            content = _read(path)
        except FileNotFoundError:
            raise ConfigError(f"there is no cache in {root}; fill one with `hyperagent cache populate`") from None
        try:
            manifest = json.loads(content)
            version = manifest["format_version"]
            if version != FORMAT_VERSION:
                raise ConfigError(
                    f"the cache in {root} is of format version {version}, this release reads {FORMAT_VERSION}"
                )
            identity = TeacherIdentity(**manifest["identity"])
            is_whole = identity.fingerprint == manifest["fingerprint"]
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptRecord(f"{path} is damaged: {error}; restore it, or populate a new cache") from error
        if not is_whole:
            raise CorruptRecord(
                f"{path} is damaged: its fingerprint is not that of its identity; restore it, or populate a new cache"
            )
        return cls(root, identity, hot)

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
        """Digest of everything that decides a record: the teacher, the tokens [T], the supervised positions [N]."""
        digest = blake3(_KEY_DOMAIN)
        digest.update(bytes.fromhex(self.identity.fingerprint))
        digest.update(len(token_ids).to_bytes(8, "little") + len(positions).to_bytes(8, "little"))
        digest.update(token_ids.astype("<u4", copy=False).tobytes())
        digest.update(positions.astype("<u4", copy=False).tobytes())
        return digest.hexdigest()

    def contains(self, key: str) -> bool:
        """Whether a whole record is on disk; a damaged one does not count, so populating again mends it."""
        return self.stored_digest(key) is not None

    def stored_digest(self, key: str) -> str | None:
        """Digest (hex) of the whole record on disk; None where there is none, or a damaged one."""
        try:
            content, _ = self._read_disk(key)
        except NotFound:
            return None
        except CorruptRecord as error:
            log.warning("damaged record will be written again", key=key, reason=str(error))
            return None
        return record_digest(content)

    def put(self, key: str, rows: TopKRows, *, num_tokens: int) -> str:
        """Write one record, replacing what is there.

        Returns:
            The record's digest (hex).

        Args:
            key: from `key`.
            num_tokens: tokens of the trajectory, context included.

        Raises:
            InvalidRequest: the rows are not distributions over this teacher's vocabulary, or not of its top k.
            StorageError: the file system refused; nothing has changed.
        """
        rows.validate(num_tokens=num_tokens, vocab_size=self.identity.vocab_size)
        if rows.top_k != self.identity.top_k:
            raise InvalidRequest(
                f"the rows keep {rows.top_k} ids, the cache in {self.root} holds rows of {self.identity.top_k}"
            )
        content = encode_record(key, rows, num_tokens=num_tokens)
        write_atomically(self._path(key), content)
        if self._hot:
            self._hot.put(key, content)
        return record_digest(content)

    def get(self, key: str) -> CachedRecord:
        """Read one record, from the hot tier if it has it.

        Raises:
            NotFound: there is none.
            CorruptRecord: it is damaged; says which and how to mend it.
            StorageError: the file system refused.
        """
        if self._hot and (content := self._hot.get(key)) is not None:
            try:
                return decode_record(content, key=key)
            except CorruptRecord as error:
                log.warning("damaged value in the hot tier dropped", key=key, reason=str(error))
                self._hot.drop(key)
        content, record = self._read_disk(key)
        if self._hot:
            self._hot.put(key, content)
        return record

    def keys(self) -> Iterator[str]:
        """Every key on disk, sorted."""
        return (path.stem for path in self._paths())

    def __iter__(self) -> Iterator[tuple[str, CachedRecord]]:
        """Every key and its record, read from disk.

        Raises:
            CorruptRecord: on reaching a damaged one.
        """
        for key in self.keys():
            yield key, self._read_disk(key)[1]

    def verify(self, progress: Callable[[int, int], None] = lambda _done, _total: None) -> VerifyReport:
        """Check every byte on disk; `progress` is called with (records done, records to do)."""
        paths = list(self._paths())
        damaged: list[tuple[Path, str]] = []
        digests: dict[str, str] = {}
        for done, path in enumerate(paths, start=1):
            try:
                content = _read(path)
                decode_record(content, key=path.stem)
                digests[path.stem] = record_digest(content)
            except CorruptRecord as error:
                damaged.append((path, str(error)))
            progress(done, len(paths))
        leftovers = sorted(path for path in self.root.rglob("*") if is_aside(path))
        return VerifyReport(len(digests), tuple(damaged), tuple(leftovers), cache_digest(digests))

    def stats(self) -> CacheStats:
        """Count what is there, reading every record."""
        records = supervised = context = size = 0
        for key, record in self:
            records += 1
            supervised += record.rows.num_rows
            context += record.num_tokens
            size += self._path(key).stat().st_size
        return CacheStats(records, supervised, context, size, self.identity.top_k)

    def _read_disk(self, key: str) -> tuple[bytes, CachedRecord]:
        path = self._path(key)
        try:
            content = _read(path)
        except FileNotFoundError:
            raise NotFound(f"the cache in {self.root} has no record {key}; run `hyperagent cache populate`") from None
        try:
            return content, decode_record(content, key=key)
        except CorruptRecord as error:
            raise CorruptRecord(
                f"record {path} is damaged: {error}; run `hyperagent cache populate` again to mend it"
            ) from error

    def _paths(self) -> Iterator[Path]:
        return (path for path in sorted((self.root / "objects").glob("??/*.topk")) if not is_aside(path))

    def _data_path(self, fingerprint: str) -> Path:
        return self.root / "data" / f"{fingerprint}.json"

    def _path(self, key: str) -> Path:
        return self.root / "objects" / key[:2] / f"{key}.topk"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(
            f"could not read {path}: {error.strerror}; check the disk and the file's permissions"
        ) from error


def _manifest_path(root: Path) -> Path:
    return root / "manifest.json"
