"""Conversion between records and `TopKRows`, whose rows are sorted by rank and padded to one width."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hyperagent.cache.format.manifest import Manifest
from hyperagent.cache.format.record import Header, StoredRows, decode_block, encode_block
from hyperagent.cache.format.truncation import keep_mass
from hyperagent.identity import TeacherIdentity
from hyperagent.topk import TopKRows


def to_record(key: bytes, rows: TopKRows, manifest: Manifest, *, first_token: int, num_tokens: int) -> bytes:
    """Encode a block's valid `rows` as a record, with the settings of the cache's manifest.

    Args:
        first_token, num_tokens: see `encode_block`.
    """
    identity, settings = manifest.identity, manifest.settings
    if settings.kept_mass < 1:
        rows = keep_mass(rows, kept_mass=settings.kept_mass, min_k=settings.min_k, temperatures=identity.temperatures)
    return encode_block(
        key,
        rows,
        first_token=first_token,
        num_tokens=num_tokens,
        codec=settings.row_codec,
        vocab_size=identity.vocab_size,
    )


def decode_rows(header: Header, payload: memoryview, identity: TeacherIdentity) -> StoredRows:
    """Decode a block's record with the vocabulary and temperatures of the teacher `identity`."""
    return decode_block(header, payload, vocab_size=identity.vocab_size, num_temperatures=len(identity.temperatures))


def to_top_k_rows(stored: StoredRows, top_k: int) -> TopKRows:
    """Convert `stored` to rows sorted by descending log-probability, ties by id, padded up to `top_k`."""
    counts_N = stored.kept.counts_N
    ids_NK, logprobs_NK = padded_rows(stored, top_k)
    if not stored.by_rank:
        # Ids are ascending and the sort is stable, so ties remain ordered by id; padding sorts last.
        order_NK = np.argsort(-logprobs_NK, axis=1, kind="stable")
        ids_NK = np.take_along_axis(ids_NK, order_NK, axis=1)
        logprobs_NK = np.take_along_axis(logprobs_NK, order_NK, axis=1)
    is_padding_NK = np.arange(top_k) >= counts_N[:, None]
    return TopKRows(
        positions=stored.positions_N,
        ids=np.where(is_padding_NK, ids_NK[:, :1], ids_NK),
        logprobs=logprobs_NK.astype(np.float32),
        tail_logmass=stored.tail_logmass_N.astype(np.float32),
        target_logprob=stored.target_logprob_N.astype(np.float32),
        tail_logsumexps=stored.tail_logsumexps_NM.astype(np.float32),
    )


def padded_rows(stored: StoredRows, top_k: int) -> tuple[NDArray[np.uint32], NDArray[np.floating]]:
    """Return ids and log-probabilities [N, K] in stored order; padding repeats the first id with -inf."""
    counts_N = stored.kept.counts_N
    shape = (len(counts_N), top_k)
    if len(stored.kept.ids_n) == len(counts_N) * top_k:
        return stored.kept.ids_n.reshape(shape), stored.kept.logprobs_n.reshape(shape)
    firsts = stored.kept.ids_n[np.cumsum(counts_N) - counts_N]
    ids_NK = np.repeat(firsts, top_k).reshape(shape)
    logprobs_NK = np.full(shape, -np.inf, stored.kept.logprobs_n.dtype)
    is_kept_NK = np.arange(top_k) < counts_N[:, None]
    ids_NK[is_kept_NK] = stored.kept.ids_n
    logprobs_NK[is_kept_NK] = stored.kept.logprobs_n
    return ids_NK, logprobs_NK
