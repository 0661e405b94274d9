"""Every byte of a cache checked, and what it holds counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from hyperagent.cache.format.record import HEADER_BYTES, Header, Kind
from hyperagent.cache.format.shard import (
    SEALED,
    SHARD_HEADER_BYTES,
    Found,
    check_seal,
    fingerprint_of,
    read_footer,
    scan,
    shard_paths,
)
from hyperagent.cache.local import LocalCache
from hyperagent.errors import CorruptRecord
from hyperagent.files import is_temporary

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written."""

    path: Path
    offset: int
    reason: str
    key: str = ""
    """Of the record (hex), where that is known."""


@dataclass(frozen=True)
class VerifyReport:
    """What checking every byte found."""

    trajectories: int
    """Those that are whole."""
    records: int
    """Whole records that count."""
    damaged: tuple[Damage, ...]
    incomplete: tuple[str, ...]
    """Trajectories (keys) that damage makes unreadable; populating again mends them."""
    leftovers: tuple[Path, ...]
    """What killed writers left behind; harmless."""
    digest: str
    """`cache_digest` of the whole trajectories."""


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds."""

    trajectories: int
    blocks: int
    supervised_tokens: int
    """Rows on disk: tokens whose distribution is kept. One that several trajectories share counts once."""
    context_tokens: int
    """Tokens of all trajectories, supervised or not."""
    shared_tokens: int
    """Rows that are not on disk again because an earlier trajectory begins with them too."""
    bytes: int
    """Of all shards."""
    dead_bytes: int
    """Of records that do not count any more; compaction frees them."""
    codec: str
    top_k: int
    mean_k: float
    """Ids that a row keeps."""
    kept_mass: float
    """Probability of a row's kept ids, mean."""
    kl_nats: float
    """What storing has cost: KL(teacher's row || stored row), mean."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes per supervised token on disk."""
        return self.bytes / self.supervised_tokens if self.supervised_tokens else 0.0


def cache_digest(digests: Mapping[str, str]) -> str:
    """One digest (hex) of many trajectories' digests (hex), by key: two caches with the same one hold the same rows."""
    digest = blake3()
    for key in sorted(digests):
        digest.update(bytes.fromhex(key + digests[key]))
    return digest.hexdigest()


def verify(cache: LocalCache, progress: Progress = lambda _done, _total: None) -> VerifyReport:
    """Check every byte on disk; `progress` is called with (bytes done, bytes to do)."""
    paths = shard_paths(cache.root / "shards")
    total, done = sum(path.stat().st_size for path in paths), 0
    ends = cache.index.ends()
    damaged: list[Damage] = []
    whole: set[bytes] = set()
    for path in paths:
        entries = {entry.key: entry for entry in cache.index.entries(path.stem)}
        for found in _check_shard(path, cache.identity.fingerprint, ends, damaged):
            done += found.length
            progress(done, total)
            entry = entries.get(found.header.key) if found.header else None
            if entry is not None and entry.at.offset == found.offset and not found.damage:
                whole.add(entries.pop(entry.key).key)
        reported = {damage.offset for damage in damaged if damage.path == path}
        damaged.extend(
            Damage(path, entry.at.offset, "the index names a record that is not whole there", entry.key.hex())
            for entry in entries.values()
            if entry.at.offset not in reported
        )
    for name in sorted(set(ends) - {path.stem for path in paths}):
        reason = f"the shard is gone, and with it {len(cache.index.entries(name))} records"
        damaged.append(Damage(cache.root / "shards" / name, 0, reason))
    return _report(cache, damaged, whole)


def count(cache: LocalCache, progress: Progress = lambda _done, _total: None) -> CacheStats:
    """Count what there is, from the records' headers; `progress` is called with (shards done, shards)."""
    blocks = trajectories = rows = kept = context = live_bytes = 0
    kl = mass = 0.0
    paths = shard_paths(cache.root / "shards")
    for done, path in enumerate(paths):
        progress(done, len(paths))
        with path.open("rb") as file:
            for entry in cache.index.entries(path.stem):
                file.seek(entry.at.offset)
                header = Header.from_bytes(memoryview(file.read(HEADER_BYTES)))
                live_bytes += entry.at.length
                if header.kind is Kind.BLOCK:
                    blocks += 1
                    rows += header.num_rows
                    kept += header.num_kept
                    kl += header.kl_nats * header.num_rows
                    mass += header.kept_mass * header.num_rows
                else:
                    trajectories += 1
                    context += header.num_tokens
    used = [block for key in cache.trajectory_keys() for block in cache.trajectory(key).blocks]
    distinct = {block.key: block.num_rows for block in used}
    return CacheStats(
        trajectories=trajectories,
        blocks=blocks,
        supervised_tokens=rows,
        context_tokens=context,
        shared_tokens=sum(block.num_rows for block in used) - sum(distinct.values()),
        bytes=sum(path.stat().st_size for path in paths),
        dead_bytes=sum(end - SHARD_HEADER_BYTES for end in cache.index.ends().values()) - live_bytes,
        codec=cache.settings.codec,
        top_k=cache.identity.top_k,
        mean_k=kept / rows if rows else 0.0,
        kept_mass=mass / rows if rows else 0.0,
        kl_nats=kl / rows if rows else 0.0,
    )


def _check_shard(path: Path, fingerprint: str, ends: Mapping[str, int], damaged: list[Damage]) -> list[Found]:
    """The records of one shard; what is not as it was written is added to `damaged`."""
    try:
        if fingerprint_of(path) != fingerprint:
            raise CorruptRecord("it is of another teacher")
    except CorruptRecord as error:
        damaged.append(Damage(path, 0, str(error)))
    end = ends.get(path.stem, SHARD_HEADER_BYTES)
    if path.suffix == SEALED:
        try:
            check_seal(path)
            end = read_footer(path)[1]
        except CorruptRecord as error:
            damaged.append(Damage(path, 0, str(error)))
    all_found = list(scan(path, start=SHARD_HEADER_BYTES, end=min(end, path.stat().st_size)))
    damaged.extend(
        Damage(path, found.offset, found.damage, found.header.key.hex() if found.header else "")
        for found in all_found
        if found.damage
    )
    return all_found


def _report(cache: LocalCache, damaged: list[Damage], whole: set[bytes]) -> VerifyReport:
    digests: dict[str, str] = {}
    incomplete = []
    for key in cache.trajectory_keys():
        # Scanned above; what the reader has mapped and checked earlier must not vouch for what is damaged since.
        digest = cache.stored_digest(key) if _is_complete(cache, key, whole) else None
        if digest is None:
            incomplete.append(key)
        else:
            digests[key] = digest
    leftovers = sorted(path for path in cache.root.rglob("*") if is_temporary(path))
    return VerifyReport(
        trajectories=len(digests),
        records=len(whole),
        damaged=tuple(damaged),
        incomplete=tuple(incomplete),
        leftovers=tuple(leftovers),
        digest=cache_digest(digests),
    )


def _is_complete(cache: LocalCache, key: str, whole: set[bytes]) -> bool:
    return bytes.fromhex(key) in whole and all(block.key in whole for block in cache.trajectory(key).blocks)
