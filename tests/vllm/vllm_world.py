"""Helpers that the tests of the vLLM engine share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing

import numpy as np
from numpy.typing import NDArray

from hyperagent.topk import TopKRows, concatenate
from hyperagent_teacher.engines.base import ScoringEngine
from hyperagent_teacher.engines.vllm import VllmEngine

TOP_K = 16
TEMPERATURES = (0.5, 2.0)
MAX_TOKENS = 2048
ENGINE_ARGS = {
    "enforce_eager": True,
    "gpu_memory_utilization": 0.3,
    # Smaller than a sequence, so that prefill takes several steps.
    "max_num_batched_tokens": 256,
}
NUM_TOKENS = 1000

Load = Callable[..., Awaitable[VllmEngine]]


async def score_all(
    engine: ScoringEngine, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], top_k: int = TOP_K
) -> TopKRows:
    async with aclosing(engine.score(token_ids, positions, top_k=top_k)) as parts:
        return concatenate([part async for part in parts])


def sequence(vocab_size: int, seed: int = 0) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return random ids and 400 positions, which include the first and the last."""
    generator = np.random.default_rng(seed)
    token_ids = generator.integers(0, vocab_size, NUM_TOKENS).astype(np.uint32)
    inner = np.sort(generator.choice(np.arange(2, NUM_TOKENS - 1), 398, replace=False))
    return token_ids, np.concatenate([[1], inner, [NUM_TOKENS - 1]]).astype(np.uint32)
