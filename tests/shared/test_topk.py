"""Tests that top-k rows reject what is not a distribution, and are joined in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hyperagent.errors import InvalidRequest
from hyperagent.topk import TopKRows, concatenate

VOCAB = 11
TEMPERATURES = (0.5, 2.0)


def rows(num_rows: int = 3, top_k: int = 4, *, seed: int = 0, first: int = 1) -> TopKRows:
    """Return the top k of random distributions over a vocabulary of 11, computed in float64."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_rows, VOCAB)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1)
    kept, rest = order[:, :top_k], order[:, top_k:]
    with np.errstate(divide="ignore"):
        tail, *tails = (
            np.log(np.exp(np.take_along_axis(logprobs, rest, axis=1) / t).sum(axis=1)) for t in (1, *TEMPERATURES)
        )
    return TopKRows(
        positions=np.arange(first, first + num_rows, dtype=np.uint32),
        ids=kept.astype(np.uint32),
        logprobs=np.take_along_axis(logprobs, kept, axis=1).astype(np.float32),
        tail_logmass=tail.astype(np.float32),
        target_logprob=logprobs[:, 0].astype(np.float32),
        tail_logsumexps=np.stack(tails, axis=1).astype(np.float32),
    )


@pytest.mark.parametrize("top_k", [1, 4, VOCAB])
def test_a_distribution_passes(top_k: int) -> None:
    made = rows(top_k=top_k)
    made.validate(num_tokens=4, vocab_size=VOCAB, temperatures=TEMPERATURES)
    assert (made.num_rows, made.top_k) == (3, top_k)
    assert np.isneginf(made.tail_logmass).all() == (top_k == VOCAB)


def test_no_rows_pass() -> None:
    rows(num_rows=0).validate(num_tokens=0, vocab_size=VOCAB, temperatures=TEMPERATURES)


def changed(name: str, index: Any, value: Any) -> TopKRows:
    array = getattr(rows(), name).copy()
    array[index] = value
    return replace(rows(), **{name: array})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(rows(), positions=np.arange(2, dtype=np.uint32)), "disagree in shape"),
        (replace(rows(), tail_logmass=np.zeros((3, 1), np.float32)), "disagree in shape"),
        (replace(rows(), ids=np.zeros(3, np.uint32)), r"must be \[N, K\]"),
        (replace(rows(), ids=np.zeros((3, 0), np.uint32), logprobs=np.zeros((3, 0), np.float32)), r"must be \[N, K\]"),
        (changed("positions", 0, 0), r"increase strictly within \[1, 4\)"),
        (changed("positions", 2, 4), r"increase strictly within \[1, 4\)"),
        (changed("positions", 1, 1), "increase strictly"),
        (changed("positions", slice(None), [3, 2, 1]), "increase strictly"),
        (changed("ids", (1, 2), VOCAB), "id 11 is outside the vocabulary of 11"),
        (changed("logprobs", (1, 2), np.nan), "not finite"),
        (changed("logprobs", (1, 2), -np.inf), "not finite"),
        (changed("target_logprob", 0, np.nan), "not finite"),
        (changed("tail_logmass", 0, np.nan), "not finite"),
        (changed("tail_logmass", 1, 0.0), r"sum to [12]\.\d+, not 1"),
        (
            replace(rows(), tail_logsumexps=np.zeros((3, 1), np.float32)),
            r"3 rows at 2 temperatures have shape \(3, 1\)",
        ),
        (changed("tail_logsumexps", (0, 1), np.nan), "at temperature 2"),
        (changed("tail_logsumexps", (0, 1), -np.inf), "at temperature 2"),
        (changed("tail_logsumexps", (2, 0), 0.0), "at temperature 0.5"),
        (replace(rows(), tail_logsumexps=rows().tail_logsumexps[:, ::-1]), "at temperature 0.5"),
        (changed("logprobs", (2, 3), -30.0), r"sum to 0\.\d+, not 1"),
        (changed("logprobs", (2, 0), -30.0), "not ordered by descending log-probability"),
        (changed("logprobs", (2, 0), 0.1), "above 0"),
        (changed("target_logprob", 1, 1e-3), "above 0"),
        (replace(rows(), ids=rows().ids[:, [0, 0, 2, 3]]), "contains an id twice"),
        (
            replace(
                rows(), ids=np.tile(np.array([5, 3, 1, 0], np.uint32), (3, 1)), logprobs=np.full((3, 4), -2, np.float32)
            ),
            "not ordered by descending",
        ),
    ],
)
def test_what_is_no_distribution_is_named(bad: TopKRows, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        bad.validate(num_tokens=4, vocab_size=VOCAB, temperatures=TEMPERATURES)


def test_runs_are_joined_in_order() -> None:
    whole = rows(num_rows=6)
    parts = [
        TopKRows(**{name: array[run] for name, array in vars(whole).items()})
        for run in (slice(0, 2), slice(2, 2), slice(2, 6))
    ]
    joined = concatenate(parts)
    for name, array in vars(whole).items():
        np.testing.assert_array_equal(getattr(joined, name), array)
        assert getattr(joined, name).dtype == array.dtype
    with pytest.raises(InvalidRequest, match="no top-k rows"):
        concatenate([])
