"""Compare a teacher's cached rows of the same trajectories under their own and under a foreign condition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperagent.cache.base import CacheReader
from hyperagent.cache.remote import open_for_reading
from hyperagent.data.files.checked_sample import require_counterparts
from hyperagent.data.files.tokens_file import TokenizedTrajectory, TokensFile, read_data_identity, read_tokens
from hyperagent.data.files.tokens_rows import read_tokens_rows
from hyperagent.errors import DataError
from hyperagent.identity import require_same
from hyperagent.progress import Progress, no_progress
from hyperagent.teacher_check.divergence import kl_lower_bound
from hyperagent.topk import TopKRows


@dataclass(frozen=True, eq=False)
class ComparedTrajectory:
    """The teacher's N rows of one trajectory under two conditions."""

    trajectory_id: str
    repo: str
    kl_N: NDArray[np.float64]
    """KL(own || foreign) of each row in nats, a lower bound (see `divergence`)."""
    own_nll_N: NDArray[np.float64]
    """Negative log-probability of each recorded token under the own condition, in nats."""
    foreign_nll_N: NDArray[np.float64]
    """The same under the foreign condition."""
    is_unchanged: bool
    """Whether the foreign condition is the same as the own one."""


def compare_caches(
    tokens: Path,
    cache: str | Path,
    foreign_tokens: Path,
    foreign_cache: str | Path,
    *,
    progress: Progress = no_progress,
) -> list[ComparedTrajectory]:
    """Compare the rows of every trajectory of `foreign_tokens` with those under its own condition.

    Rows are found by the digest of teacher, tokens and positions, so one cache may hold both conditions.

    Args:
        tokens: tokens file that `foreign_tokens` was made from, or the sample of it that was written with it.
        cache: folder or URL of a cache with the rows of these trajectories in `tokens`.
        foreign_cache: folder or URL of a cache with the rows of `foreign_tokens`.
        progress: called with (trajectories done, trajectories to do).

    Raises:
        DataError: a file cannot be used, or the two files do not pair one to one; the message names the trajectory.
        IdentityMismatch: the files do not belong together, or the caches hold the rows of two teachers.
        ConfigError: there is no such cache.
        CorruptRecord, StorageError: a cache cannot be read.
    """
    require_counterparts(read_data_identity(tokens), read_data_identity(foreign_tokens))
    pairs = _pairs(tokens, foreign_tokens)
    with ExitStack() as caches:
        own_reader = caches.enter_context(open_for_reading(cache))
        foreign_reader = caches.enter_context(open_for_reading(foreign_cache))
        require_same(
            f"the teacher of the cache in {foreign_reader.name}",
            expected=own_reader.identity.fingerprint,
            found=foreign_reader.identity.fingerprint,
            remedy="populate both caches with the same teacher",
        )
        compared = []
        total = len(read_tokens_rows(foreign_tokens))
        for own, foreign in pairs:
            compared.append(
                _compared(own, foreign, _rows(own_reader, own, tokens), _rows(foreign_reader, foreign, foreign_tokens))
            )
            progress(len(compared), total)
    return compared


def _pairs(tokens: Path, foreign_tokens: Path) -> Iterator[tuple[TokenizedTrajectory, TokenizedTrajectory]]:
    numbers = {row.trajectory_id: row.number for row in read_tokens_rows(tokens)}
    file = TokensFile(tokens)
    for foreign in read_tokens(foreign_tokens):
        name = foreign.trajectory_id
        if name not in numbers:
            raise DataError(
                f"trajectory {name!r} of {foreign_tokens} is not in {tokens}; give the tokens file that it was made from"
            )
        own = file.row(numbers[name])
        if not np.array_equal(own.token_ids[own.positions], foreign.token_ids[foreign.positions]):
            raise DataError(
                f"trajectory {name!r} has other supervised tokens in {foreign_tokens} than in {tokens}, so their rows "
                "do not pair; make the file again with `hyperagent teacher-check tokens`"
            )
        yield own, foreign


def _rows(cache: CacheReader, trajectory: TokenizedTrajectory, tokens: Path) -> TopKRows:
    key = cache.key(trajectory.token_ids, trajectory.positions)
    if not cache.contains(key):
        raise DataError(
            f"the cache in {cache.name} has no rows of trajectory {trajectory.trajectory_id!r}; populate it with "
            f"`hyperagent cache populate {tokens}`"
        )
    return cache.get(key).rows


def _compared(
    own: TokenizedTrajectory, foreign: TokenizedTrajectory, own_rows: TopKRows, foreign_rows: TopKRows
) -> ComparedTrajectory:
    return ComparedTrajectory(
        own.trajectory_id,
        own.repo,
        kl_N=kl_lower_bound(own_rows, foreign_rows),
        own_nll_N=-own_rows.target_logprob.astype(np.float64),
        foreign_nll_N=-foreign_rows.target_logprob.astype(np.float64),
        is_unchanged=np.array_equal(own.token_ids, foreign.token_ids),
    )
