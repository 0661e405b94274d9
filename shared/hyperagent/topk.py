"""Top-k rows: a teacher's distribution at the supervised positions, truncated to its k most probable ids.

Shapes: N rows, K kept ids per row, M temperatures other than 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import InvalidRequest


@dataclass(frozen=True, eq=False)
class TopKRows:
    """The teacher's distribution at N positions of one token sequence.

    Row n is the distribution of the token *at* `positions[n]` given all tokens before it, so a position is
    at least 1, and a causal model's logits for the row are its output at `positions[n] - 1`.

    All log-probabilities are natural, under the teacher's full softmax over its real vocabulary (never
    renormalized over the kept ids). Ids in a row are ordered by descending log-probability, ties by id.

    A row may keep fewer than K ids, but at least one: it then ends in padding, which repeats the row's first id with a
    log-probability of -inf.
    """

    positions: NDArray[np.uint32]
    """Positions of the rows' tokens, shape [N], strictly increasing."""
    ids: NDArray[np.uint32]
    """Kept ids, shape [N, K]."""
    logprobs: NDArray[np.float32]
    """Log-probabilities of the kept ids, shape [N, K]."""
    tail_logmass: NDArray[np.float32]
    """Log of the probability mass outside the kept ids, shape [N]; -inf if K is the whole vocabulary."""
    target_logprob: NDArray[np.float32]
    """Log-probability of the actual token at the position, kept or not, shape [N]."""
    tail_logsumexps: NDArray[np.float32]
    """Log of the sum of p^(1/t) over the ids that are not kept, per temperature t of the teacher's identity, shape
    [N, M]; -inf if there are none. It makes the row exact at temperature t: the kept ids' log-probabilities at t are
    log p / t minus the log-sum-exp of all log p / t and this value. At t = 1 it would be `tail_logmass`."""

    @property
    def num_rows(self) -> int:
        return int(self.positions.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[1])

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of ids that each row keeps, padding excluded, shape [N]."""
        return np.asarray((self.logprobs > -np.inf).sum(axis=1), dtype=np.int64)

    def at(self, rows: NDArray[np.integer]) -> TopKRows:
        """Return copies of the rows at indices `rows` [n]."""
        return self._columns(rows)

    def part(self, cut: slice) -> TopKRows:
        """Return consecutive rows as views."""
        return self._columns(cut)

    def _columns(self, index: slice | NDArray[np.integer]) -> TopKRows:
        return TopKRows(*(getattr(self, field.name)[index] for field in fields(self)))

    def validate(self, *, num_tokens: int, vocab_size: int, temperatures: Sequence[float] = ()) -> None:
        """Check shapes, ranges and that each row is a distribution.

        Args:
            temperatures: the M temperatures of `tail_logsumexps`.

        Raises:
            InvalidRequest: the rows are invalid; the message describes the first violation.
        """
        if self.ids.ndim != 2 or self.ids.shape[1] == 0:
            raise InvalidRequest(f"top-k ids must be [N, K] with K at least 1, not {self.ids.shape}")
        n, k = self.ids.shape
        shapes = (self.positions.shape, self.logprobs.shape, self.tail_logmass.shape, self.target_logprob.shape)
        if shapes != ((n,), (n, k), (n,), (n,)):
            raise InvalidRequest(f"top-k rows disagree in shape: ids {(n, k)}, the others {shapes}")
        if self.tail_logsumexps.shape != (n, len(temperatures)):
            raise InvalidRequest(
                f"the tails of {n} rows at {len(temperatures)} temperatures have shape {self.tail_logsumexps.shape}"
            )
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
        for column, temperature in enumerate(temperatures):
            self._require_possible_tail(column, temperature, vocab_size)

    def _require_possible_tail(self, column: int, temperature: float, vocab_size: int) -> None:
        """Check that the tail at a temperature is possible.

        It lies between the value for all mass on one id and the value for all mass spread evenly.

        Raises:
            InvalidRequest: it does not, so it belongs to a different temperature.
        """
        found_N, tail_N = self.tail_logsumexps[:, column].astype(np.float64), self.tail_logmass.astype(np.float64)
        num_others_N = np.maximum(vocab_size - self.counts, 1)
        on_one_N = tail_N / temperature
        spread_N = on_one_N + (1 - 1 / temperature) * np.log(num_others_N)
        slack_N = MASS_TOLERANCE * np.maximum(1, np.abs(np.where(tail_N == -np.inf, 0, on_one_N)))
        lowest_N, highest_N = np.minimum(on_one_N, spread_N) - slack_N, np.maximum(on_one_N, spread_N) + slack_N
        is_possible_N = (found_N >= lowest_N) & (found_N <= highest_N)
        if not is_possible_N.all():
            row = int(np.argmin(is_possible_N))
            raise InvalidRequest(
                f"a row's tail of mass exp({tail_N[row]:.4g}) cannot be exp({found_N[row]:.4g}) at temperature {temperature}"
            )

    def _require_order(self) -> None:
        """Check that ids are distinct and ordered by descending log-probability, ties by id.

        Raises:
            InvalidRequest: they are not.
        """
        is_padding = np.arange(self.top_k) >= self.counts[:, None]
        higher, lower = self.logprobs[:, :-1], self.logprobs[:, 1:]
        ties_out_of_order = (higher == lower) & (self.ids[:, :-1] >= self.ids[:, 1:]) & ~is_padding[:, 1:]
        if (higher < lower).any() or ties_out_of_order.any():
            raise InvalidRequest("a row's ids are not ordered by descending log-probability, ties by id")
        ids = self.ids.astype(np.int64)
        if (ids != np.where(is_padding, ids[:, :1], ids)).any():
            raise InvalidRequest("a row's padding does not repeat its first id")
        # Distinct negative numbers replace padding, so that it does not count as a repeated id.
        distinct = np.sort(np.where(is_padding, -1 - np.arange(self.top_k), ids), axis=1)
        if (distinct[:, :-1] == distinct[:, 1:]).any():
            raise InvalidRequest("a row contains an id twice")


DEFAULT_TEMPERATURES = (2.0,)
"""Temperatures other than 1 at which a teacher records the tail by default."""

MASS_TOLERANCE = 5e-3
"""Tolerance for the sum of a row's stored probabilities (float16 log-probabilities are off by up to 0.4 %)."""


def concatenate(parts: Sequence[TopKRows]) -> TopKRows:
    """Join consecutive runs of rows of one sequence; a single run is returned unchanged.

    Raises:
        InvalidRequest: `parts` is empty.
    """
    if not parts:
        raise InvalidRequest("there are no top-k rows to join")
    if len(parts) == 1:
        return parts[0]
    return TopKRows(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(TopKRows)))
