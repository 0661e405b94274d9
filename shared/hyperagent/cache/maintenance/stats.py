"""Count what a cache holds, and digest it."""

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


def count(cache: LocalCache, progress: Progress = no_progress) -> CacheStats:
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
