"""Score a canary: a few tokens whose rows prove that the engine works."""

from __future__ import annotations

from contextlib import aclosing

import numpy as np

from hyperagent.topk import concatenate
from hyperagent_teacher.engines.base import ScoringEngine

CANARY_TOKENS = 8


async def score_canary(engine: ScoringEngine) -> None:
    """Score a short sequence and check its rows.

    Raises:
        ServiceError: the engine does not score.
        InvalidRequest: the rows are not distributions.
    """
    identity = engine.identity
    token_ids = np.arange(CANARY_TOKENS, dtype=np.uint32) % identity.vocab_size
    positions = np.arange(1, CANARY_TOKENS, dtype=np.uint32)
    async with aclosing(engine.score(token_ids, positions, top_k=identity.top_k)) as parts:
        rows = concatenate([part async for part in parts])
    rows.validate(num_tokens=CANARY_TOKENS, vocab_size=identity.vocab_size, temperatures=identity.temperatures)
