"""KL of two top-k rows against the definition over the whole vocabulary, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hyperagent.teacher_check.divergence import kl_lower_bound
from hyperagent.topk import TopKRows

N, V = 200, 24


def distributions(seed: int, spread: float = 2.0) -> NDArray[np.float64]:
    """Return the logarithms of random distributions [N, V]."""
    logits = np.random.default_rng(seed).normal(size=(N, V)) * spread
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def truncated(logp: NDArray[np.float64], counts: NDArray[np.int64] | int, width: int) -> TopKRows:
    """Return rows that keep the `counts` most likely ids, padded to `width` ids."""
    counts_N = np.broadcast_to(counts, len(logp))
    ids = np.argsort(-logp, axis=1)[:, :width]
    kept = np.take_along_axis(logp, ids, axis=1)
    is_padding = np.arange(width) >= counts_N[:, None]
    rest = 1 - np.where(is_padding, 0, np.exp(kept)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = np.where((counts_N == logp.shape[1]), -np.inf, np.log(rest))
    return TopKRows(
        positions=np.arange(1, len(logp) + 1, dtype=np.uint32),
        ids=np.where(is_padding, ids[:, :1], ids).astype(np.uint32),
        logprobs=np.where(is_padding, -np.inf, kept).astype(np.float32),
        tail_logmass=tail.astype(np.float32),
        target_logprob=logp[:, 0].astype(np.float32),
        tail_logsumexps=np.zeros((len(logp), 0), np.float32),
    )


def full_kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def by_hand(own: TopKRows, foreign: TopKRows) -> list[float]:
    """Compute the bound one row at a time: search the unknown mass of the own row's ids in the foreign row's tail."""
    found = []
    for n in range(own.num_rows):
        p, q = (
            {
                int(i): float(np.exp(np.float64(x)))
                for i, x in zip(rows.ids[n], rows.logprobs[n], strict=True)
                if x > -np.inf
            }
            for rows in (own, foreign)
        )
        shared = p.keys() & q.keys()
        kl = sum(p[i] * np.log(p[i] / q[i]) for i in shared)
        own_only = sum(p[i] for i in p.keys() - shared)
        foreign_only, tail_p, tail_q = (
            sum(q[i] for i in q.keys() - shared),
            float(np.exp(np.float64(own.tail_logmass[n]))),
            float(np.exp(np.float64(foreign.tail_logmass[n]))),
        )
        # Both ends of the range are allowed, and cost nothing where the own row has no mass.
        mass = np.linspace(0, tail_q, 20_001)
        with np.errstate(divide="ignore"):
            cost = (own_only * np.log(own_only / mass) if own_only else 0) + (
                tail_p * np.log(tail_p / (foreign_only + tail_q - mass)) if tail_p else 0
            )
        found.append(kl + float(np.min(cost)))
    return found


def test_it_is_exact_where_rows_keep_the_whole_vocabulary() -> None:
    p, q = distributions(0), distributions(1)
    assert kl_lower_bound(truncated(p, V, V), truncated(q, V, V)) == pytest.approx(full_kl(p, q), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("own_k", "foreign_k"), [(1, 1), (4, 4), (4, 12), (12, 4), (8, V), (V, 8)])
def test_it_is_the_smallest_possible_and_never_above_the_whole_one(own_k: int, foreign_k: int) -> None:
    p, q = distributions(2), distributions(3)
    own, foreign = truncated(p, own_k, own_k), truncated(q, foreign_k, foreign_k)
    found = kl_lower_bound(own, foreign)
    assert found == pytest.approx(by_hand(own, foreign), rel=1e-4, abs=1e-5)
    assert (found <= full_kl(p, q) + 1e-6).all()
    assert (found < full_kl(p, q) * 0.99).any()


def test_rows_that_keep_fewer_ids_are_padded_and_padding_is_no_id() -> None:
    p, q = distributions(4), distributions(5)
    counts = np.random.default_rng(6).integers(1, 9, size=(2, N))
    own, foreign = truncated(p, counts[0], 8), truncated(q, counts[1], 8)
    assert kl_lower_bound(own, foreign) == pytest.approx(by_hand(own, foreign), rel=1e-4, abs=1e-5)


def test_equal_rows_have_none() -> None:
    for width in (1, 6, V):
        rows = truncated(distributions(7), width, width)
        assert kl_lower_bound(rows, rows).max() == 0


def test_rows_that_are_certain_of_different_ids_differ_although_neither_keeps_the_other_s() -> None:
    p = np.full((1, V), 0.02 / (V - 1))
    p[0, 3] = 0.98
    q = np.roll(p, 1, axis=1)
    own, foreign = truncated(np.log(p), 1, 1), truncated(np.log(q), 1, 1)
    whole = full_kl(np.log(p), np.log(q))[0]
    # The foreign row's tail may hold nothing but the own row's id.
    assert kl_lower_bound(own, foreign)[0] == pytest.approx(
        0.98 * np.log(0.98 / 0.02) + 0.02 * np.log(0.02 / 0.98), rel=1e-5
    )
    assert 3.5 < kl_lower_bound(own, foreign)[0] < whole


def test_rounded_probabilities_are_normalized() -> None:
    """Codecs round: a row of which all log-probabilities are 0.3 % too large is the same distribution."""
    rows = truncated(distributions(8), 6, 6)
    larger = TopKRows(
        rows.positions, rows.ids, rows.logprobs + np.float32(0.003), rows.tail_logmass + np.float32(0.003),
        rows.target_logprob, rows.tail_logsumexps,
    )  # fmt: skip
    assert kl_lower_bound(rows, larger).max() < 1e-6
    assert kl_lower_bound(larger, rows).max() < 1e-6


def test_a_tail_too_small_for_float32_gives_a_large_but_finite_divergence() -> None:
    own = truncated(np.log(np.array([[0.5, 0.25, 0.25]])), 2, 2)
    foreign = TopKRows(
        own.positions, own.ids, np.array([[np.log(0.5), np.log(0.5)]], np.float32), np.array([-np.inf], np.float32),
        own.target_logprob, own.tail_logsumexps,
    )  # fmt: skip
    assert kl_lower_bound(own, foreign)[0] == pytest.approx(
        0.5 * np.log(0.5 / 0.5) + 0.25 * np.log(0.25 / 0.5) + 0.25 * (np.log(0.25) + 104), rel=1e-6
    )
