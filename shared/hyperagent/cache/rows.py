"""Stored rows as the rows everybody passes on: by rank, and padded to one width."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hyperagent.cache.record import StoredRows
from hyperagent.topk import TopKRows


def to_top_k_rows(stored: StoredRows, top_k: int) -> TopKRows:
    """`stored` with every row's ids by descending log-probability, ties by id, and padding up to `top_k`."""
    counts_N = stored.kept.counts_N
    ids_NK, logprobs_NK = padded_rows(stored, top_k)
    if not stored.by_rank:
        # Ids come rising and the sort is stable, so ties stay in the order of their ids; padding sorts last.
        order_NK = np.argsort(-logprobs_NK, axis=1, kind="stable")
        ids_NK = np.take_along_axis(ids_NK, order_NK, axis=1)
        logprobs_NK = np.take_along_axis(logprobs_NK, order_NK, axis=1)
    is_padding_NK = np.arange(top_k) >= counts_N[:, None]
    return TopKRows(
        positions=stored.positions_N,
        ids=np.where(is_padding_NK, ids_NK[:, :1], ids_NK),
        logprobs=logprobs_NK,
        tail_logmass=stored.tail_logmass_N.astype(np.float32),
        target_logprob=stored.target_logprob_N.astype(np.float32),
    )


def padded_rows(stored: StoredRows, top_k: int) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Ids and log-probabilities [N, K] in the order they are stored in; padding repeats the first id, with -inf."""
    counts_N = stored.kept.counts_N
    shape = (len(counts_N), top_k)
    if len(stored.kept.ids_n) == len(counts_N) * top_k:
        return stored.kept.ids_n.reshape(shape).astype(np.uint32, copy=False), stored.kept.logprobs_n.reshape(
            shape
        ).astype(np.float32)
    firsts = stored.kept.ids_n[np.cumsum(counts_N) - counts_N]
    ids_NK = np.repeat(firsts, top_k).reshape(shape).astype(np.uint32, copy=False)
    logprobs_NK = np.full(shape, -np.inf, np.float32)
    is_kept_NK = np.arange(top_k) < counts_N[:, None]
    ids_NK[is_kept_NK] = stored.kept.ids_n
    logprobs_NK[is_kept_NK] = stored.kept.logprobs_n
    return ids_NK, logprobs_NK
