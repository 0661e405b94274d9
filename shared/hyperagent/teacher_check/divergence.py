"""KL divergence of two top-k rows at the same position, over the ids that both keep and one bucket for all others.

Two rows of top-k ids do not say how their tails are distributed, so all ids but the shared ones are one bucket. Merging
events never increases a KL divergence (data-processing inequality), so the result is a lower bound of the divergence
over the whole vocabulary, and equal to it where both rows keep the whole vocabulary.

Legend of shape suffixes: N rows, K and L kept ids per row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hyperagent.topk import TopKRows

_SMALLEST_LOGMASS = -104.0
"""Smaller masses are 0 in float32, so a tail of -inf stands for any of them; a larger one keeps the lower bound."""


def shared_ids_kl(own: TopKRows, foreign: TopKRows) -> NDArray[np.float64]:
    """Return KL(own || foreign) of each pair of rows in nats, shape [N].

    Both distributions are normalized over their buckets first, since codecs round log-probabilities.
    """
    own_NK, foreign_NL = own.logprobs.astype(np.float64), foreign.logprobs.astype(np.float64)
    at_NK, is_shared_NK = _places(own, foreign)
    is_shared_NL = np.zeros(foreign_NL.shape, bool)
    rows_n, _ = np.nonzero(is_shared_NK)
    is_shared_NL[rows_n, at_NK[is_shared_NK]] = True

    p_NK = np.where(is_shared_NK, own_NK, -np.inf)
    q_NK = np.where(is_shared_NK, np.take_along_axis(foreign_NL, at_NK, axis=1), -np.inf)
    p_rest_N = _rest(own_NK, is_shared_NK, own.tail_logmass)
    q_rest_N = np.maximum(_rest(foreign_NL, is_shared_NL, foreign.tail_logmass), _SMALLEST_LOGMASS)
    p = _normalized(np.concatenate([p_NK, p_rest_N[:, None]], axis=1))
    q = _normalized(np.concatenate([q_NK, q_rest_N[:, None]], axis=1))
    has_mass = p > -np.inf
    terms = np.exp(p) * np.subtract(p, q, out=np.zeros_like(p), where=has_mass)
    # Rounding may leave equal rows slightly below 0.
    return np.asarray(np.maximum(terms.sum(axis=1), 0.0))


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


def _rest(
    logprobs: NDArray[np.float64], is_shared: NDArray[np.bool_], tail: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return the log of the mass outside the shared ids, shape [N]."""
    kept_N = np.logaddexp.reduce(np.where(is_shared, -np.inf, logprobs), axis=1)
    return np.asarray(np.logaddexp(kept_N, tail.astype(np.float64)))


def _normalized(logmass: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logmass - np.logaddexp.reduce(logmass, axis=1, keepdims=True))
