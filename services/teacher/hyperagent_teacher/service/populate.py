"""Fill the cache for PopulateCache: each trajectory's rows are stored, or the trajectory is refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperagent.cache.local import LocalCache
from hyperagent.data.files.tokens_file import read_data_identity, read_tokens
from hyperagent.errors import InvalidRequest, NotFound, StorageError
from hyperagent.identity import DataIdentity, require_same
from hyperagent.wire.conversion import row_bytes
from hyperagent.wire.outcome import Outcome, PopulateOutcome
from hyperagent_teacher.engines.base import ScoringEngine, require_scorable, score_from
from hyperagent_teacher.service.memory_budget import MemoryBudget


@dataclass(frozen=True, eq=False)
class Trajectory:
    """T tokens, N of which are to be scored."""

    trajectory_id: str
    token_ids: NDArray[np.uint32]
    """Token ids, shape [T]."""
    positions: NDArray[np.uint32]
    """Positions to score, shape [N]."""


class Populator:
    """Fills a cache with an engine's rows."""

    def __init__(
        self, engine: ScoringEngine, cache: LocalCache, row_memory: MemoryBudget, *, data_dir: Path | None
    ) -> None:
        """Connect the engine to the cache.

        Args:
            cache: the cache to fill, opened for the engine's identity.
            row_memory: the budget that the rows of all requests share.
            data_dir: the only folder that tokens files are read from; if None, none are read.
        """
        self._engine = engine
        self._cache = cache
        self._row_memory = row_memory
        self._data_dir = data_dir.resolve() if data_dir else None

    async def begin(self, data: DataIdentity) -> None:
        """Record in the cache which data its next trajectories belong to.

        Raises:
            StorageError: the cache cannot be written.
        """
        await asyncio.to_thread(self._cache.record_data, data)

    async def populate(self, trajectory: Trajectory) -> PopulateOutcome:
        """Ensure that the cache holds one trajectory's rows, and return what happened.

        Raises:
            StorageError: the cache cannot be written.
        """
        try:
            outcome, key, digest = await self._ensure_cached(trajectory)
            reason = ""
        except InvalidRequest as refusal:
            outcome, key, digest, reason = Outcome.REFUSED, "", "", str(refusal)
        return PopulateOutcome(
            trajectory_id=trajectory.trajectory_id,
            outcome=outcome,
            num_rows=len(trajectory.positions),
            num_tokens=len(trajectory.token_ids),
            cache_key=key,
            record_digest=digest,
            reason=reason,
        )

    async def _ensure_cached(self, trajectory: Trajectory) -> tuple[Outcome, str, str]:
        token_ids, positions, top_k = trajectory.token_ids, trajectory.positions, self._engine.identity.top_k
        require_scorable(self._engine, token_ids, positions, top_k=top_k)
        key = self._cache.key(token_ids, positions)
        if (digest := await asyncio.to_thread(self._cache.stored_digest, key)) is not None:
            return Outcome.PRESENT, key, digest
        # Blocks that an earlier, interrupted capture or another trajectory has stored are not computed again.
        capture = await asyncio.to_thread(self._cache.capture, token_ids, positions)
        num_missing = len(positions) - capture.first_row
        if num_missing:
            async with (
                self._row_memory.held(num_missing * row_bytes(top_k, len(self._engine.identity.temperatures))),
                aclosing(score_from(self._engine, token_ids, positions, capture.first_row, top_k=top_k)) as parts,
            ):
                async for part in parts:
                    await asyncio.to_thread(capture.add, part)
        await asyncio.to_thread(capture.finish)
        digest = await asyncio.to_thread(self._cache.stored_digest, key)
        if digest is None:
            raise StorageError(f"the rows written for trajectory {key} cannot be read back; check the disk")
        return Outcome.WRITTEN, key, digest

    async def read_file(self, name: str, data: DataIdentity) -> AsyncIterator[Trajectory]:
        """Stream the trajectories of a tokens file inside the data folder.

        Raises:
            InvalidRequest: the name is outside the data folder, or there is no data folder.
            NotFound: the file does not exist.
            DataError: the file is not a tokens file.
            IdentityMismatch: the file holds other data than the caller names.
        """
        path = self._confined(name)
        found = await asyncio.to_thread(read_data_identity, path)
        require_same(
            f"the data of {name!r}",
            expected=data,
            found=found,
            remedy="name the file that the identity was read from",
        )
        rows = read_tokens(path)
        while (row := await asyncio.to_thread(next, rows, None)) is not None:
            yield Trajectory(row.trajectory_id, row.token_ids, row.positions)

    def _confined(self, name: str) -> Path:
        if self._data_dir is None:
            raise InvalidRequest("this teacher reads no files; send trajectories, or start it with --data-dir")
        if "\0" in name or not (path := (self._data_dir / name).resolve()).is_relative_to(self._data_dir):
            raise InvalidRequest(f"{name!r} is outside the data folder; name a file inside it")
        if not path.is_file():
            raise NotFound(f"there is no tokens file {name!r} in the data folder; put it there, or send trajectories")
        return path
