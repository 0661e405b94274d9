"""Adaptive k: keep only as many ids of each row as needed to reach a probability mass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hyperagent.topk import TopKRows


def keep_mass(rows: TopKRows, *, kept_mass: float, min_k: int, temperatures: Sequence[float]) -> TopKRows:
    """Keep the fewest most likely ids of each row whose probabilities sum to `kept_mass`, followed by padding.

    Dropped ids are added to the tail at every temperature, so a row's mass remains 1. A row whose ids do not reach
    `kept_mass` keeps all of them.

    Args:
        kept_mass: above 0, at most 1.
        min_k: minimum number of ids to keep per row, if it has that many.
        temperatures: temperatures of `rows.tail_logsumexps`.
    """
    cumulated_NK = np.cumsum(np.exp(rows.logprobs, dtype=np.float64), axis=1)
    needed_N = (cumulated_NK < kept_mass).sum(axis=1) + 1
    counts_N = np.clip(needed_N, min_k, rows.counts)
    if (counts_N == rows.counts).all():
        return rows
    keeps_NK = np.arange(rows.top_k) < counts_N[:, None]
    dropped_NK = np.where(keeps_NK, -np.inf, rows.logprobs.astype(np.float64))
    tail_N = np.logaddexp(np.logaddexp.reduce(dropped_NK, axis=1), rows.tail_logmass)
    tails_NM = rows.tail_logsumexps.copy()
    for column, temperature in enumerate(temperatures):
        dropped_N = np.logaddexp.reduce(dropped_NK / temperature, axis=1)
        tails_NM[:, column] = np.logaddexp(dropped_N, rows.tail_logsumexps[:, column])
    return replace(
        rows,
        ids=np.where(keeps_NK, rows.ids, rows.ids[:, :1]),
        logprobs=np.where(keeps_NK, rows.logprobs, np.float32(-np.inf)),
        tail_logmass=tail_N.astype(np.float32),
        tail_logsumexps=tails_NM,
    )
