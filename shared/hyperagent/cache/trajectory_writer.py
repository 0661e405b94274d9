"""Writing one trajectory block by block, so that an interrupted capture can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hyperagent.cache.format.convert import to_record
from hyperagent.cache.format.keys import BlockPlan
from hyperagent.cache.format.manifest import Manifest
from hyperagent.cache.format.record import BlockOfTrajectory, encode_trajectory
from hyperagent.errors import InvalidRequest
from hyperagent.topk import TopKRows, concatenate

_WRITE_BYTES = 8 << 20
"""Number of bytes collected before they are written durably."""


class TrajectoryWriter:
    """Accept a trajectory's rows in order and write each block once it is complete; not thread-safe."""

    def __init__(
        self,
        key: str,
        blocks: Sequence[BlockPlan],
        manifest: Manifest,
        *,
        num_tokens: int,
        first_missing: int,
        write: Callable[[Sequence[bytes]], None],
    ) -> None:
        """Initialize the writer; use `LocalCache.capture` instead.

        Args:
            first_missing: number of leading `blocks` that the cache already holds.
            write: function that stores records durably.
        """
        self.key = key
        """Key of the trajectory (hex)."""
        self._blocks = blocks
        self._manifest = manifest
        self._num_tokens = num_tokens
        self._write = write
        self._next_block = first_missing
        self._waiting: list[TopKRows] = []
        self._encoded: list[bytes] = []

    @property
    def first_row(self) -> int:
        """Index of the first row that is needed; all rows before it are in the cache."""
        return self._blocks[self._next_block].rows.start if self._next_block < len(self._blocks) else self._num_rows

    @property
    def _num_rows(self) -> int:
        return self._blocks[-1].rows.stop if self._blocks else 0

    def add(self, rows: TopKRows) -> None:
        """Add the next rows, in order, starting with `first_row`.

        Raises:
            InvalidRequest: the rows are not distributions over this teacher's vocabulary, or have another top k.
            StorageError: a file operation failed; blocks written before are kept.
        """
        identity = self._manifest.identity
        rows.validate(num_tokens=self._num_tokens, vocab_size=identity.vocab_size, temperatures=identity.temperatures)
        if rows.top_k != identity.top_k:
            raise InvalidRequest(
                f"the rows keep {rows.top_k} ids, the cache holds rows of {identity.top_k}; ask for as many"
            )
        self._waiting.append(rows)
        while self._next_block < len(self._blocks):
            block = self._blocks[self._next_block]
            if sum(part.num_rows for part in self._waiting) < block.num_rows:
                break
            waiting = concatenate(self._waiting)
            self._encoded.append(self._encode(block, waiting.part(slice(block.num_rows))))
            self._waiting = [waiting.part(slice(block.num_rows, None))]
            self._next_block += 1
        if sum(map(len, self._encoded)) >= _WRITE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Store the complete blocks durably.

        Raises:
            StorageError: a file operation failed; the flush can be repeated.
        """
        self._write(self._encoded)
        self._encoded = []

    def finish(self) -> None:
        """Store all remaining blocks and the trajectory itself durably.

        Raises:
            InvalidRequest: there are too few or too many rows.
            StorageError: a file operation failed; blocks written before are kept.
        """
        left = sum(part.num_rows for part in self._waiting)
        if self._next_block < len(self._blocks) or left:
            raise InvalidRequest(
                f"the capture of trajectory {self.key} ends with {left} rows over before block "
                f"{self._next_block} of {len(self._blocks)}; give it exactly the rows it asked for"
            )
        blocks = [BlockOfTrajectory(block.index, block.num_rows, block.key) for block in self._blocks]
        self._encoded.append(encode_trajectory(bytes.fromhex(self.key), blocks, num_tokens=self._num_tokens))
        self.flush()

    def _encode(self, block: BlockPlan, rows: TopKRows) -> bytes:
        if not np.array_equal(rows.positions, block.positions):
            raise InvalidRequest(
                f"rows at positions from {rows.positions[0]} came where those from {block.positions[0]} are due"
            )
        return to_record(block.key, rows, self._manifest, first_token=block.first_token, num_tokens=block.num_tokens)
