"""The rows everybody passes on: a teacher's distribution at the supervised positions, cut to its top k.

Shapes: N rows, K kept ids per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import InvalidRequest


@dataclass(frozen=True, eq=False)
class TopKRows:
    """The teacher's distribution at N positions of one token sequence.

    Row n is the distribution of the token *at* `positions[n]` given all tokens before it, so a position is
    at least 1, and a causal model's logits for the row are its output at `positions[n] - 1`.

    All log-probabilities are natural, under the teacher's full softmax over its real vocabulary (never
    renormalised over the kept ids). Ids in a row are ordered by descending log-probability, ties by id.

    A row may keep fewer than K ids, but at least one: it then ends in padding, which repeats the row's first id with a
    log-probability of -inf.
    """

    positions: NDArray[np.uint32]
    """[N], strictly increasing."""
    ids: NDArray[np.uint32]
    """[N, K]."""
    logprobs: NDArray[np.float32]
    """[N, K]."""
    tail_logmass: NDArray[np.float32]
    """[N], log of the probability mass outside the kept ids; -inf when K is the whole vocabulary."""
    target_logprob: NDArray[np.float32]
    """[N], log-probability of the token that really stands at the position, kept or not."""

    @property
    def num_rows(self) -> int:
        return int(self.positions.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[1])

    @property
    def counts(self) -> NDArray[np.int64]:
        """[N], ids that each row keeps, padding not counted."""
        return np.asarray((self.logprobs > -np.inf).sum(axis=1), dtype=np.int64)

    def at(self, rows: NDArray[np.integer]) -> TopKRows:
        """The rows of some indices [n]; copies."""
        return TopKRows(
            self.positions[rows],
            self.ids[rows],
            self.logprobs[rows],
            self.tail_logmass[rows],
            self.target_logprob[rows],
        )

    def part(self, cut: slice) -> TopKRows:
        """Some consecutive rows; views, not copies."""
        return TopKRows(
            self.positions[cut], self.ids[cut], self.logprobs[cut], self.tail_logmass[cut], self.target_logprob[cut]
        )

    def validate(self, *, num_tokens: int, vocab_size: int) -> None:
        """Check shapes, ranges and that each row is a distribution.

        Raises:
            InvalidRequest: naming the first thing that is wrong.
        """
        if self.ids.ndim != 2 or self.ids.shape[1] == 0:
            raise InvalidRequest(f"top-k ids must be [N, K] with K at least 1, not {self.ids.shape}")
        n, k = self.ids.shape
        shapes = (self.positions.shape, self.logprobs.shape, self.tail_logmass.shape, self.target_logprob.shape)
        if shapes != ((n,), (n, k), (n,), (n,)):
            raise InvalidRequest(f"top-k rows disagree in shape: ids {(n, k)}, the others {shapes}")
        if n == 0:
            return
        if (
            self.positions[0] < 1
            or self.positions[-1] >= num_tokens
            or not (np.diff(self.positions.astype(np.int64)) > 0).all()
        ):
            raise InvalidRequest(f"positions must increase strictly within [1, {num_tokens})")
        if int(self.ids.max()) >= vocab_size:
            raise InvalidRequest(f"id {int(self.ids.max())} is outside the vocabulary of {vocab_size}")
        counts = self.counts
        if (
            (self.logprobs[np.arange(k) < counts[:, None]] == -np.inf).any()
            or np.isnan(self.logprobs).any()
            or not np.isfinite(self.target_logprob).all()
            or np.isnan(self.tail_logmass).any()
            or counts.min() == 0
        ):
            raise InvalidRequest("a log-probability is not finite")
        if self.target_logprob.max() > 0 or self.logprobs.max() > 0:
            raise InvalidRequest("a log-probability is above 0")
        self._require_order()
        mass = np.exp(self.logprobs.astype(np.float64)).sum(axis=1) + np.exp(self.tail_logmass.astype(np.float64))
        if np.abs(mass - 1).max() > MASS_TOLERANCE:
            raise InvalidRequest(f"a row's probabilities sum to {mass[np.abs(mass - 1).argmax()]:.4f}, not 1")

    def _require_order(self) -> None:
        """Ids stand by descending log-probability, ties by id, and each stands once.

        Raises:
            InvalidRequest: they do not.
        """
        is_padding = np.arange(self.top_k) >= self.counts[:, None]
        higher, lower = self.logprobs[:, :-1], self.logprobs[:, 1:]
        ties_out_of_order = (higher == lower) & (self.ids[:, :-1] >= self.ids[:, 1:]) & ~is_padding[:, 1:]
        if (higher < lower).any() or ties_out_of_order.any():
            raise InvalidRequest("a row's ids are not in the order of their log-probabilities, ties by id")
        ids = self.ids.astype(np.int64)
        if (ids != np.where(is_padding, ids[:, :1], ids)).any():
            raise InvalidRequest("a row's padding does not repeat its first id")
        # Padding is told apart by negative numbers, no two alike.
        distinct = np.sort(np.where(is_padding, -1 - np.arange(self.top_k), ids), axis=1)
        if (distinct[:, :-1] == distinct[:, 1:]).any():
            raise InvalidRequest("a row holds an id twice")

    def normalised(self) -> TopKRows:
        """The same rows with kept and tail mass scaled to sum to exactly 1, undoing rounding in storage."""
        lp = self.logprobs.astype(np.float64)
        tail = self.tail_logmass.astype(np.float64)
        log_total = np.logaddexp(np.logaddexp.reduce(lp, axis=1), tail)
        return TopKRows(
            positions=self.positions,
            ids=self.ids,
            logprobs=(lp - log_total[:, None]).astype(np.float32),
            tail_logmass=(tail - log_total).astype(np.float32),
            target_logprob=self.target_logprob,
        )


MASS_TOLERANCE = 5e-3
"""How far a row's stored probabilities may sum from 1 (float16 log-probabilities are off by up to 0.4 %)."""


def concatenate(parts: Sequence[TopKRows]) -> TopKRows:
    """Join consecutive runs of rows of one sequence; a single one is returned as it is.

    Raises:
        InvalidRequest: `parts` is empty.
    """
    if not parts:
        raise InvalidRequest("there are no top-k rows to join")
    if len(parts) == 1:
        return parts[0]
    return TopKRows(
        positions=np.concatenate([p.positions for p in parts]),
        ids=np.concatenate([p.ids for p in parts]),
        logprobs=np.concatenate([p.logprobs for p in parts]),
        tail_logmass=np.concatenate([p.tail_logmass for p in parts]),
        target_logprob=np.concatenate([p.target_logprob for p in parts]),
    )
