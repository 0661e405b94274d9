"""Check every byte of a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
from hyperagent.cache.maintenance.stats import cache_digest
from hyperagent.errors import CorruptRecord
from hyperagent.progress import Progress, no_progress
from hyperagent.storage.files import is_temporary


@dataclass(frozen=True)
class Damage:
    """A damaged region of a shard."""

    path: Path
    offset: int
    reason: str
    key: str = ""
    """Key of the damaged record (hex), if known."""


@dataclass(frozen=True)
class VerifyReport:
    """Result of checking every byte."""

    trajectories: int
    """Number of intact trajectories."""
    records: int
    """Number of intact live records."""
    damaged: tuple[Damage, ...]
    incomplete: tuple[str, ...]
    """Keys of trajectories that are unreadable because of damage; populating again restores them."""
    leftovers: tuple[Path, ...]
    """Files left by killed writers; harmless."""
    digest: str
    """`cache_digest` of the intact trajectories."""


def verify(cache: LocalCache, progress: Progress = no_progress) -> VerifyReport:
    """Check every byte on disk; `progress` is called with (bytes done, total bytes)."""
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
            Damage(path, entry.at.offset, "the index points to a record that is not intact", entry.key.hex())
            for entry in entries.values()
            if entry.at.offset not in reported
        )
    for name in sorted(set(ends) - {path.stem for path in paths}):
        reason = f"the shard is missing, and with it {len(cache.index.entries(name))} records"
        damaged.append(Damage(cache.root / "shards" / name, 0, reason))
    return _report(cache, damaged, whole)


def _check_shard(path: Path, fingerprint: str, ends: Mapping[str, int], damaged: list[Damage]) -> list[Found]:
    """Return the records of one shard and add damaged regions to `damaged`."""
    try:
        if fingerprint_of(path) != fingerprint:
            raise CorruptRecord("it belongs to another teacher")
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
        # Check again: a record that the reader has checked earlier may have been damaged since.
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
