"""Cache keys: BLAKE3 digests over the teacher's fingerprint and the tokens that determine a record.

A causal teacher's row depends only on the tokens up to it, so a block's key is a hash chain over all blocks up to
that block. Trajectories with a common prefix share their first blocks, and an interrupted capture continues at the
first missing block. (The chain is that of vLLM's prefix cache,
https://docs.vllm.ai/en/latest/design/prefix_caching.html.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

_CHAIN_DOMAIN = b"hyperagent-topk-chain-2"
_BLOCK_DOMAIN = b"hyperagent-topk-block-2"
_TRAJECTORY_DOMAIN = b"hyperagent-topk-key-2"


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Block of a trajectory that has supervised positions."""

    index: int
    key: bytes
    first_token: int
    num_tokens: int
    rows: slice
    """Slice of the trajectory's rows that the block holds."""
    positions: NDArray[np.uint32]
    """Positions of these rows in the trajectory, ascending."""

    @property
    def num_rows(self) -> int:
        return int(self.rows.stop - self.rows.start)


def trajectory_key(fingerprint: str, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32]) -> str:
    """Return the digest (hex) of everything that determines a trajectory's rows: teacher, tokens [T], positions [N]."""
    digest = blake3(_TRAJECTORY_DOMAIN)
    digest.update(bytes.fromhex(fingerprint))
    digest.update(len(token_ids).to_bytes(8, "little") + len(positions).to_bytes(8, "little"))
    digest.update(token_ids.astype("<u4", copy=False).tobytes())
    digest.update(positions.astype("<u4", copy=False).tobytes())
    return digest.hexdigest()


def plan_blocks(
    fingerprint: str, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, block_tokens: int
) -> Iterator[BlockPlan]:
    """Yield, in order, the blocks that hold the rows at ascending `positions` [N] of `token_ids` [T]."""
    chain = blake3(_CHAIN_DOMAIN + bytes.fromhex(fingerprint)).digest()
    firsts = np.searchsorted(positions, np.arange(0, len(token_ids) + block_tokens, block_tokens))
    for index, first_token in enumerate(range(0, len(token_ids), block_tokens)):
        block = token_ids[first_token : first_token + block_tokens]
        chain = blake3(chain + block.astype("<u4", copy=False).tobytes()).digest()
        rows = slice(int(firsts[index]), int(firsts[index + 1]))
        if rows.start < rows.stop:
            offsets = (positions[rows] - np.uint32(first_token)).astype("<u4")
            key = blake3(_BLOCK_DOMAIN + chain + offsets.tobytes()).digest()
            yield BlockPlan(index, key, first_token, len(block), rows, positions[rows])
