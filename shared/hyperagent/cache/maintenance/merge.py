"""Import of one cache's records into another: from another machine, or with other storage settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hyperagent.cache.format.codecs import EXACT
from hyperagent.cache.format.convert import decode_rows, to_record, to_top_k_rows
from hyperagent.cache.format.manifest import CacheSettings, Manifest
from hyperagent.cache.format.record import BlockOfTrajectory
from hyperagent.cache.local import LocalCache
from hyperagent.errors import ConfigError
from hyperagent.identity import require_same
from hyperagent.progress import Progress, no_progress

_BLOCKS_AT_ONCE = 64


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge."""

    trajectories: int
    """Number of trajectories in the source."""
    already_there: int
    """Number of these that the target already had intact."""


def merge(source: LocalCache, target: LocalCache, progress: Progress = no_progress) -> MergeReport:
    """Copy every trajectory of `source` into `target`, keeping existing ones; can be rerun after an interruption.

    Raises:
        IdentityMismatch: they hold different teachers' rows.
        ConfigError: converting between their storage settings would round rows twice or split blocks differently.
        CorruptRecord: a record of `source` is damaged; records copied before are kept.
        StorageError: a file operation failed; records copied before are kept.
    """
    if source.identity.fingerprint != target.identity.fingerprint:
        require_same(
            f"the teacher of the cache in {source.root}",
            expected=target.identity,
            found=source.identity,
            remedy="give each teacher a cache folder of its own",
        )
    _require_convertible(source.settings, target.settings)
    for data in source.data_identities():
        target.record_data(data)
    already_there = 0
    keys = source.trajectory_keys()
    for done, key in enumerate(keys):
        progress(done, len(keys))
        if target.is_intact(key):
            already_there += 1
            continue
        blocks = source.trajectory(key).blocks
        for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
            target.write_records(_records(source, target, blocks[start : start + _BLOCKS_AT_ONCE]))
        # The trajectory is written last, because its presence implies that of its blocks.
        target.write_records([source.record(bytes.fromhex(key))])
    progress(len(keys), len(keys))
    return MergeReport(len(keys), already_there)


def _require_convertible(source: CacheSettings, target: CacheSettings) -> None:
    if source == target:
        return
    if source.block_tokens != target.block_tokens:
        raise ConfigError(
            f"blocks of {source.block_tokens} tokens cannot become blocks of {target.block_tokens}; make the new cache "
            "with the same block_tokens"
        )
    if source.codec != EXACT.name or source.kept_mass < 1:
        raise ConfigError(
            f"rows stored with {source} have been rounded, and would be rounded again with {target}; import from a cache "
            "with the codec exact and all ids, or leave the new cache's settings as they are"
        )


def _records(source: LocalCache, target: LocalCache, blocks: Iterable[BlockOfTrajectory]) -> list[bytes]:
    if source.settings == target.settings:
        return [source.record(block.key) for block in blocks]
    keys = [block.key for block in blocks]
    manifest = Manifest(target.identity, target.settings)
    records = []
    for header, payload in source.records_of(keys):
        rows = to_top_k_rows(decode_rows(header, payload, source.identity), source.identity.top_k)
        records.append(
            to_record(header.key, rows, manifest, first_token=header.first_token, num_tokens=header.num_tokens)
        )
    return records
