"""Lower bound of the KL divergence of two top-k rows at the same position.

Two rows of top-k ids do not say how their tails are distributed. The ids are therefore merged to these events: each id
that both rows keep; the ids that only the own row keeps; all others. Merging events never increases a KL divergence
(data-processing inequality). Of the second event, the foreign row states only that its mass is at most that of its tail,
so it gets the mass within this limit that makes the divergence smallest. The result is a lower bound of the divergence
over the whole vocabulary, and equal to it where both rows keep the whole vocabulary.

Without the second event, two rows that are certain of different ids would seem equal if neither keeps the other's id.

Legend of shape suffixes: N rows, K and L kept ids per row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hyperagent.topk import TopKRows

_SMALLEST_LOGMASS = -104.0
"""Smaller masses are 0 in float32, so a tail of -inf stands for any of them; a larger one keeps the lower bound."""


def kl_lower_bound(own: TopKRows, foreign: TopKRows) -> NDArray[np.float64]:
    """Return a lower bound of KL(own || foreign) of each pair of rows in nats, shape [N].

    Both distributions are normalized over the events first, since codecs round log-probabilities.
    """
    own_NK, foreign_NL = own.logprobs.astype(np.float64), foreign.logprobs.astype(np.float64)
    at_NK, is_shared_NK = _places(own, foreign)
    is_shared_NL = np.zeros(foreign_NL.shape, bool)
    rows_n, _ = np.nonzero(is_shared_NK)
    is_shared_NL[rows_n, at_NK[is_shared_NK]] = True

    p_NK = np.where(is_shared_NK, own_NK, -np.inf)
    q_NK = np.where(is_shared_NK, np.take_along_axis(foreign_NL, at_NK, axis=1), -np.inf)
    p_own_only_N, p_others_N = _mass(own_NK, ~is_shared_NK), own.tail_logmass.astype(np.float64)
    q_own_only_N, q_others_N = _least_divergent(
        p_own_only_N,
        p_others_N,
        q_foreign_only_N=_mass(foreign_NL, ~is_shared_NL),
        q_tail_N=np.maximum(foreign.tail_logmass.astype(np.float64), _SMALLEST_LOGMASS),
    )
    p = _normalized(np.column_stack([p_NK, p_own_only_N, p_others_N]))
    q = _normalized(np.column_stack([q_NK, q_own_only_N, q_others_N]))
    terms = np.exp(p) * np.subtract(p, q, out=np.zeros_like(p), where=p > -np.inf)
    # Rounding may leave equal rows slightly below 0.
    return np.asarray(np.maximum(terms.sum(axis=1), 0.0))


def _least_divergent(
    p_own_only_N: NDArray[np.float64],
    p_others_N: NDArray[np.float64],
    *,
    q_foreign_only_N: NDArray[np.float64],
    q_tail_N: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the log-masses [N] that the foreign row gives to the ids that only the own row keeps, and to all others.

    The divergence is convex in the first of them and smallest where both events have the own row's proportion, or at
    the limit, the mass of the foreign row's tail.
    """
    p_both_N, q_both_N = np.logaddexp(p_own_only_N, p_others_N), np.logaddexp(q_foreign_only_N, q_tail_N)
    has_mass_N = p_both_N > -np.inf
    own_only_share_N = np.subtract(p_own_only_N, p_both_N, out=np.full_like(p_both_N, -np.inf), where=has_mass_N)
    others_share_N = np.subtract(p_others_N, p_both_N, out=np.zeros_like(p_both_N), where=has_mass_N)
    is_limited_N = q_tail_N < q_both_N + np.minimum(own_only_share_N, 0.0)
    return (
        np.where(is_limited_N, q_tail_N, q_both_N + own_only_share_N),
        np.where(is_limited_N, q_foreign_only_N, q_both_N + others_share_N),
    )


def _places(own: TopKRows, foreign: TopKRows) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the place of each of the own ids among the foreign row's ids [N, K], and whether it is there."""
    order_NL = np.argsort(_unpadded(foreign), axis=1, kind="stable")
    sorted_NL = np.take_along_axis(_unpadded(foreign), order_NL, axis=1)
    # One number per (row, id) makes all rows one sorted array.
    offset_N1 = np.arange(own.num_rows, dtype=np.int64)[:, None] << 32
    keys_n = (sorted_NL + offset_N1).ravel()
    wanted_NK = own.ids.astype(np.int64) + offset_N1
    found_NK = np.minimum(np.searchsorted(keys_n, wanted_NK), len(keys_n) - 1)
    is_shared_NK = (keys_n[found_NK] == wanted_NK) & (own.logprobs > -np.inf)
    at_NK = np.where(is_shared_NK, order_NL.ravel()[found_NK], 0)
    return at_NK, is_shared_NK


def _unpadded(rows: TopKRows) -> NDArray[np.int64]:
    """Return the kept ids [N, K] with a number that is no id in place of padding."""
    return np.where(rows.logprobs > -np.inf, rows.ids.astype(np.int64), (1 << 32) - 1)


def _mass(logprobs: NDArray[np.float64], is_counted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the log of the mass of the counted ids of each row, shape [N]."""
    return np.asarray(np.logaddexp.reduce(np.where(is_counted, logprobs, -np.inf), axis=1))


def _normalized(logmass: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logmass - np.logaddexp.reduce(logmass, axis=1, keepdims=True))
