"""Make random top-k rows for the tests of the cache."""

from __future__ import annotations

import numpy as np

from hyperagent.cache.local import LocalCache
from hyperagent.identity import TeacherIdentity
from hyperagent.topk import TopKRows

VOCABULARY = 300
TEMPERATURES = (0.5, 2.0)
IDENTITY = TeacherIdentity(
    model="t", weights="1" * 64, dtype="float32", backend="x", tokenizer_sha256="2" * 64, template_sha256="3" * 64,
    vocab_size=VOCABULARY, top_k=8, temperatures=TEMPERATURES,
)  # fmt: skip

TOKENS = np.arange(40, dtype=np.uint32)


def filled(cache: LocalCache, count: int = 3) -> list[str]:
    """Put trajectories of 10, 11, ... rows and return their keys."""
    return [cache.put(TOKENS + number, random_rows(10 + number % 10, 8, seed=number)) for number in range(count)]


def random_rows(num_rows: int, top_k: int, *, seed: int = 0, spread: float = 3.0) -> TopKRows:
    """Return rows of random distributions over `VOCABULARY` ids, at every second position from 1."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(num_rows, VOCABULARY)) * spread
    logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-logp, axis=1)[:, :top_k]
    rest = np.take_along_axis(logp, np.argsort(-logp, axis=1)[:, top_k:], axis=1)
    return TopKRows(
        positions=np.arange(1, 2 * num_rows, 2, dtype=np.uint32),
        ids=ids.astype(np.uint32),
        logprobs=np.take_along_axis(logp, ids, axis=1).astype(np.float32),
        tail_logmass=np.logaddexp.reduce(rest, axis=1, initial=-np.inf).astype(np.float32),
        target_logprob=logp[:, 0].astype(np.float32),
        tail_logsumexps=np.stack(
            [np.logaddexp.reduce(rest / temperature, axis=1, initial=-np.inf) for temperature in TEMPERATURES], axis=1
        ).astype(np.float32),
    )
