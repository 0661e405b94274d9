"""The seam between the service and whatever runs the model."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import InvalidRequest, LimitExceeded
from hyperagent.identity import TeacherIdentity
from hyperagent.topk import TopKRows


class ScoringEngine(Protocol):
    """Computes a teacher's rows."""

    @property
    def identity(self) -> TeacherIdentity:
        """Who computes the rows."""

    @property
    def max_tokens(self) -> int:
        """Longest sequence accepted, in tokens."""

    def score(
        self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, top_k: int
    ) -> AsyncGenerator[TopKRows, None]:
        """Yield the rows of `positions`, in order, some at a time, without blocking the event loop.

        Closing the generator, or cancelling the task that waits for it, stops the computation.

        Args:
            token_ids: [T], as `require_scorable` accepts.
            positions: [N], likewise.
            top_k: ids per row, likewise.

        Raises:
            LimitExceeded: the sequence does not fit in the device's memory.
            ServiceError: the model's output is not finite.
        """

    def close(self) -> None:
        """Stop for good and give back what the engine holds."""


def require_scorable(
    engine: ScoringEngine, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, top_k: int
) -> None:
    """Check a request before any work is done for it.

    Raises:
        LimitExceeded: more tokens, or more ids per row, than the teacher accepts.
        InvalidRequest: an id is outside the vocabulary, or positions do not increase strictly within [1, T).
    """
    num_tokens, vocab_size = len(token_ids), engine.identity.vocab_size
    if num_tokens > engine.max_tokens:
        raise LimitExceeded(
            f"{num_tokens:,} tokens are too many: this teacher accepts {engine.max_tokens:,}; "
            "leave the trajectory out, or raise the teacher's --max-tokens if its model allows more"
        )
    if not 1 <= top_k <= engine.identity.top_k:
        raise LimitExceeded(f"top_k must lie in [1, {engine.identity.top_k}], not {top_k}; ask for fewer ids per row")
    if num_tokens and int(token_ids.max()) >= vocab_size:
        raise InvalidRequest(
            f"token id {int(token_ids.max())} is outside the vocabulary of {vocab_size}; "
            "tokenise with the teacher's tokenizer"
        )
    if len(positions) == 0:
        raise InvalidRequest("there is no position to score; ask for at least one")
    if positions[0] < 1 or positions[-1] >= num_tokens or not (np.diff(positions.astype(np.int64)) > 0).all():
        raise InvalidRequest(f"positions must increase strictly within [1, {num_tokens}); sort them and drop repeats")
