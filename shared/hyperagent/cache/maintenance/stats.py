"""Statistics and digest of a cache's contents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blake3 import blake3

from hyperagent.cache.format.record import HEADER_BYTES, Header, Kind
from hyperagent.cache.format.shard import SHARD_HEADER_BYTES, shard_paths
from hyperagent.cache.local import LocalCache
from hyperagent.progress import Progress, no_progress


@dataclass(frozen=True)
class CacheStats:
    """Counts and averages over a cache's contents."""

    trajectories: int
    blocks: int
    supervised_tokens: int
    """Number of stored rows, that is tokens with a stored distribution. A row that trajectories share counts once."""
    context_tokens: int
    """Number of tokens in all trajectories, supervised or not."""
    shared_tokens: int
    """Number of rows saved because another trajectory has the same prefix."""
    bytes: int
    """Total size of all shards in bytes."""
    dead_bytes: int
    """Bytes of records that are no longer live; compaction frees them."""
    codec: str
    top_k: int
    mean_k: float
    """Mean number of ids kept per row."""
    kept_mass: float
    """Mean probability of a row's kept ids."""
    kl_nats: float
    """Mean KL(teacher's row || stored row) in nats, the distortion caused by storage."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes per supervised token on disk."""
        return self.bytes / self.supervised_tokens if self.supervised_tokens else 0.0


def cache_digest(digests: Mapping[str, str]) -> str:
    """Combine trajectories' digests (hex) by key into one digest (hex); caches with equal digests hold the same rows."""
    digest = blake3()
    for key in sorted(digests):
        digest.update(bytes.fromhex(key + digests[key]))
    return digest.hexdigest()


def count(cache: LocalCache, progress: Progress = no_progress) -> CacheStats:
    """Count the contents of a cache from its record headers; `progress` is called with (shards done, shards)."""
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
