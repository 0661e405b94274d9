"""Repair a damaged cache: intact records are kept, and damaged shards are quarantined and never read again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyperagent.cache.format.manifest import read_manifest
from hyperagent.cache.format.shard import OPEN
from hyperagent.cache.index_rebuild import rebuild_index
from hyperagent.cache.local import LocalCache
from hyperagent.cache.locks import held_exclusively
from hyperagent.cache.maintenance.compact import copy_records, owned_shards
from hyperagent.cache.maintenance.verify import Damage, verify
from hyperagent.errors import StorageError
from hyperagent.progress import Progress, no_progress
from hyperagent.storage.files import fsync_directory, is_temporary, remedy_of

QUARANTINE = "quarantine"
"""Folder to which damaged shards are moved for inspection; safe to delete."""


@dataclass(frozen=True)
class RepairReport:
    """Result of a repair."""

    damaged: tuple[Damage, ...]
    quarantined: tuple[Path, ...]
    """New paths of the damaged shards; their contents are unchanged."""
    to_populate: tuple[str, ...]
    """Keys of trajectories that lost blocks; populating again computes only these blocks."""
    trajectories: int
    """Number of intact trajectories."""


def repair(root: Path, progress: Progress = no_progress) -> RepairReport:
    """Rebuild the index, copy intact records out of damaged shards, and quarantine those shards.

    Raises:
        ConfigError: there is no cache.
        CorruptRecord: its manifest is damaged.
        Conflict: another process has it open.
        StorageError: a file operation failed.
    """
    fingerprint = read_manifest(root).identity.fingerprint
    with held_exclusively(root / "readers.lock"):
        try:
            rebuild_index(root, fingerprint)
        except OSError as error:
            raise StorageError(f"could not rebuild the index: {error.strerror or error}; {remedy_of(error)}") from error
    with LocalCache.open(root, exclusive=True) as cache:
        found = verify(cache, progress)
        lost = {bytes.fromhex(damage.key) for damage in found.damaged if damage.key}
        with cache.index.transaction():
            cache.index.remove([*lost, *(bytes.fromhex(key) for key in found.incomplete)])
        damaged = [path for path in sorted({damage.path for damage in found.damaged}) if path.exists()]
        # The shard is locked, so that nothing is copied into it before it is moved away.
        with owned_shards(cache, [path for path in damaged if path.suffix == OPEN]):
            quarantined = [_quarantine(cache, path) for path in damaged]
        for path in root.rglob("*"):
            if is_temporary(path):
                path.unlink()
        return RepairReport(found.damaged, tuple(quarantined), found.incomplete, verify(cache).trajectories)


def _quarantine(cache: LocalCache, path: Path) -> Path:
    copy_records(cache, cache.index.entries(path.stem))
    with cache.index.transaction():
        cache.index.remove_shard(path.stem)
    target = cache.root / QUARANTINE / path.name
    try:
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        fsync_directory(target.parent)
        fsync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"could not quarantine {path}: {error.strerror}; {remedy_of(error)}") from error
    return target
