"""The interface of engines, and checks that all of them share."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import ConfigError, InvalidRequest, LimitExceeded
from hyperagent.identity import TeacherIdentity
from hyperagent.topk import TopKRows


class ScoringEngine(Protocol):
    """Computes a teacher's rows."""

    @property
    def identity(self) -> TeacherIdentity:
        """Return the identity of the model and everything else that decides the rows."""

    @property
    def max_tokens(self) -> int:
        """Return the longest sequence accepted, in tokens."""

    @property
    def rows_per_step(self) -> int:
        """Return the number of rows computed together.

        Rows asked for from a multiple of it on have the same bits, since each product of matrices has the same operands.
        """

    @property
    def progress(self) -> int:
        """Return a number that changes with every step the engine completes; an engine with work and no change hangs."""

    def score(
        self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, top_k: int
    ) -> AsyncGenerator[TopKRows, None]:
        """Yield the rows of `positions` in order and in parts, without blocking the event loop.

        Closing the generator, or canceling the task that awaits it, stops the computation.

        Args:
            token_ids: uint32, shape [T]; must pass `require_scorable`.
            positions: uint32, shape [N]; must pass `require_scorable`.
            top_k: ids per row; must pass `require_scorable`.

        Raises:
            LimitExceeded: the sequence does not fit in the device's memory.
            ServiceError: the model's output is not finite.
            NotServing: the engine has stopped.
        """

    async def restart(self) -> None:
        """Abandon the computations in progress and start the engine again; their callers get `NotServing`.

        Raises:
            EngineHangs: the engine cannot be restarted within this process.
            ServiceError: the engine does not start.
        """

    def close(self) -> None:
        """Stop for good and release all resources."""


async def score_from(
    engine: ScoringEngine, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], first_row: int, *, top_k: int
) -> AsyncGenerator[TopKRows, None]:
    """Score from row `first_row` on; the rows have the same bits as when all rows are scored at once.

    Raises:
        As `ScoringEngine.score`.
    """
    # The computation begins with the whole step of the first row; the step's rows before it are dropped.
    surplus = first_row % engine.rows_per_step
    async with aclosing(engine.score(token_ids, positions[first_row - surplus :], top_k=top_k)) as parts:
        async for rows in parts:
            if rows.num_rows > surplus:
                yield rows.part(slice(surplus, None))
            surplus = max(0, surplus - rows.num_rows)


def require_scorable(
    engine: ScoringEngine, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, top_k: int
) -> None:
    """Check that a request can be scored, before any work is done for it.

    Raises:
        LimitExceeded: the sequence has more tokens than the teacher accepts.
        InvalidRequest: there is no token, an id is outside the vocabulary, top_k is out of range, or the positions do
            not increase strictly within [1, T).
    """
    num_tokens, vocab_size = len(token_ids), engine.identity.vocab_size
    if num_tokens > engine.max_tokens:
        raise LimitExceeded(
            f"the sequence has {num_tokens:,} tokens, but this teacher accepts at most {engine.max_tokens:,}; "
            "leave the trajectory out, or raise the teacher's --max-tokens if its model allows more"
        )
    if not 1 <= top_k <= engine.identity.top_k:
        raise InvalidRequest(
            f"top_k must lie in [1, {engine.identity.top_k}], not {top_k}; ask for that many ids per row"
        )
    if not num_tokens:
        raise InvalidRequest("there is no token to score; send at least two")
    if int(token_ids.max()) >= vocab_size:
        raise InvalidRequest(
            f"token id {int(token_ids.max())} is outside the vocabulary of {vocab_size}; "
            "tokenize with the teacher's tokenizer"
        )
    if len(positions) == 0:
        raise InvalidRequest("there is no position to score; ask for at least one")
    if positions[0] < 1 or positions[-1] >= num_tokens or not (np.diff(positions.astype(np.int64)) > 0).all():
        raise InvalidRequest(f"positions must increase strictly within [1, {num_tokens}); sort them and drop repeats")


def require_vocabulary(folder: Path, *, model_vocab_size: int, vocab_size: int, top_k: int) -> None:
    """Refuse a tokenizer with more entries than the model, and rows with more ids than the vocabulary.

    Raises:
        ConfigError: one of the two sizes is too large; the message names both.
    """
    if vocab_size > model_vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} entries, but the model in {folder} has only {model_vocab_size}; "
            "give the model's own tokenizer (--tokenizer)"
        )
    if not 1 <= top_k <= vocab_size:
        raise ConfigError(f"--top-k must lie in [1, {vocab_size}], the size of the vocabulary, not {top_k}")


def dtype_name(model: object, head: object) -> str:
    """Return an identity's name for the torch dtypes of a model and of its head's product."""
    names = [str(dtype).removeprefix("torch.") for dtype in (model, head)]
    return names[0] if names[0] == names[1] else f"{names[0]}, head {names[1]}"
