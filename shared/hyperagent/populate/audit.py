"""Audit of a cache: score random positions again with the live teacher and compare the rows."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperagent.cache.local import LocalCache
from hyperagent.data.files.tokens_file import TokensFile, read_tokens
from hyperagent.errors import DataError
from hyperagent.identity import require_same
from hyperagent.progress import Progress, no_progress
from hyperagent.topk import TopKRows, concatenate
from hyperagent.wire.client import TeacherClient


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of absolute differences over positions."""

    mean: float
    p50: float
    p99: float
    max: float


@dataclass(frozen=True)
class AuditReport:
    """Differences between cached rows and those of the live teacher."""

    positions: int
    trajectories: int
    top_k_overlap: float
    """Fraction of cached ids that the live rows keep too."""
    kl_nats: Quantiles
    """KL(cached || live) per position in nats, over the ids that both keep and one bucket for the rest."""
    logprob_difference: Quantiles
    """Differences of the log-probabilities of ids that both keep."""
    target_difference: Quantiles
    """Differences of the log-probability of the actual next token."""


async def audit(
    cache: LocalCache,
    tokens: Path,
    teacher: TeacherClient,
    *,
    num_positions: int,
    seed: int,
    progress: Progress = no_progress,
) -> AuditReport:
    """Score `num_positions` random cached positions again.

    Raises:
        IdentityMismatch: the teacher is not the one that populated the cache.
        DataError: no trajectory of the file is in the cache.
        CorruptRecord: a record is damaged.
    """
    facts = await teacher.get_teacher()
    require_same(
        f"the teacher at {teacher.address}",
        expected=cache.identity.fingerprint,
        found=facts.identity.fingerprint,
        remedy="audit with the teacher that filled the cache",
    )
    rows, counts = _cached_rows(cache, tokens)
    file = TokensFile(tokens)
    pairs: list[tuple[TopKRows, TopKRows]] = []
    chosen = _choose(counts, num_positions, seed)
    for done, (place, picked) in enumerate(chosen.items(), start=1):
        trajectory = file.row(rows[place])
        record = cache.get(cache.key(trajectory.token_ids, trajectory.positions))
        wanted = trajectory.positions[picked]
        answer = teacher.score_tokens(
            trajectory.token_ids, wanted, top_k=cache.identity.top_k, tokenizer=facts.identity.tokenizer
        )
        async with aclosing(answer) as parts:
            live = concatenate([part async for part in parts])
        pairs.append((record.rows.at(picked), live))
        progress(done, len(chosen))
    return compare(pairs)


def compare(pairs: list[tuple[TopKRows, TopKRows]]) -> AuditReport:
    """Compare cached and live rows of the same positions, trajectory by trajectory."""
    kl: list[float] = []
    logprob: list[NDArray[np.float64]] = []
    target: list[NDArray[np.float32]] = []
    kept = shared = 0
    for cached, live in pairs:
        cached_counts, live_counts = cached.counts, live.counts
        target.append(np.abs(cached.target_logprob - live.target_logprob))
        for row in range(cached.num_rows):
            cached_ids, live_ids = cached.ids[row, : cached_counts[row]], live.ids[row, : live_counts[row]]
            ids, in_cached, in_live = np.intersect1d(cached_ids, live_ids, return_indices=True)
            p, q = (
                values.astype(np.float64) for values in (cached.logprobs[row][in_cached], live.logprobs[row][in_live])
            )
            kept, shared = kept + len(cached_ids), shared + len(ids)
            logprob.append(np.abs(p - q))
            kl.append(_coarse_kl(p, q))
    differences = np.concatenate(logprob)
    return AuditReport(
        positions=len(kl),
        trajectories=len(pairs),
        top_k_overlap=shared / kept,
        kl_nats=_quantiles(np.array(kl)),
        logprob_difference=_quantiles(differences),
        target_difference=_quantiles(np.concatenate(target)),
    )


def _coarse_kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Return the KL of two distributions given on some ids [n], with the remaining mass of each in one extra bucket."""
    smallest = float(np.finfo(np.float32).eps)
    rest_p = max(1.0 - float(np.exp(p).sum()), smallest)
    rest_q = max(1.0 - float(np.exp(q).sum()), smallest)
    return max(0.0, float((np.exp(p) * (p - q)).sum()) + rest_p * float(np.log(rest_p / rest_q)))


def _cached_rows(cache: LocalCache, tokens: Path) -> tuple[list[int], NDArray[np.int64]]:
    """Return the rows of the tokens file that are in the cache, and the supervised positions of each."""
    rows, counts = [], []
    for row, trajectory in enumerate(read_tokens(tokens)):
        if cache.contains(cache.key(trajectory.token_ids, trajectory.positions)):
            rows.append(row)
            counts.append(len(trajectory.positions))
    if not rows:
        raise DataError(f"the cache in {cache.root} holds no trajectory of {tokens}; populate it from this file")
    return rows, np.array(counts, np.int64)


def _choose(counts: NDArray[np.int64], num_positions: int, seed: int) -> dict[int, NDArray[np.int64]]:
    """Draw positions uniformly; return, by index of the cached trajectory, the indices of its drawn positions."""
    total = int(counts.sum())
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(num_positions, total), replace=False))
    ends = np.cumsum(counts)
    places = np.searchsorted(ends, chosen, side="right")
    return {int(place): chosen[places == place] - (ends[place] - counts[place]) for place in np.unique(places)}


def _quantiles(values: NDArray[np.floating]) -> Quantiles:
    return Quantiles(
        mean=float(values.mean()),
        p50=float(np.quantile(values, 0.5)),
        p99=float(np.quantile(values, 0.99)),
        max=float(values.max()),
    )
