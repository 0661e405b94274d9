"""The record format: against a reader written from docs/cache-format.md alone, and against damage."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from cache_rows import IDENTITY, VOCABULARY, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperagent.cache.codec import decode_record, encode_record
from hyperagent.cache.store import TopKCache
from hyperagent.errors import CorruptRecord

KEY = "ab" * 32


def test_a_reader_written_from_the_document_reads_the_same(tmp_path: Path) -> None:
    rows = random_rows(5, 8)
    token_ids = np.arange(100, 120, dtype=np.uint32)
    cache = TopKCache.create_or_open(tmp_path, IDENTITY)
    cache.put(cache.key(token_ids, rows.positions), rows, num_tokens=20)

    fingerprint = bytes.fromhex(IDENTITY.fingerprint)
    digest = blake3(b"hyperagent-topk-key-1" + fingerprint + struct.pack("<QQ", 20, 5))
    digest.update(struct.pack("<20I", *range(100, 120)) + struct.pack("<5I", 1, 3, 5, 7, 9))
    key = digest.hexdigest()
    content = (tmp_path / "objects" / key[:2] / f"{key}.topk").read_bytes()

    assert blake3(content[:-32]).digest() == content[-32:]
    magic, version, zero, n, k, tokens = struct.unpack_from("<4sHHIII", content)
    assert (magic, version, zero, n, k, tokens) == (b"HATK", 1, 0, 5, 8, 20)
    assert content[20:52].hex() == key
    assert len(content) == 84 + n * (12 + 6 * k)
    assert struct.unpack_from("<5I", content, 52) == (1, 3, 5, 7, 9)
    ids = struct.unpack_from("<40I", content, 72)
    assert list(ids) == rows.ids.ravel().tolist()
    logprobs = struct.unpack_from("<40e", content, 232)
    np.testing.assert_allclose(logprobs, rows.logprobs.ravel(), rtol=2**-11)
    tail_and_target = struct.unpack_from("<10f", content, 312)
    assert list(tail_and_target) == [*rows.tail_logmass.tolist(), *rows.target_logprob.tolist()]


@settings(deadline=None)
@given(n=st.integers(1, 30), k=st.integers(1, VOCABULARY), spread=st.floats(0.01, 300), seed=st.integers(0, 99))
def test_rows_survive_within_the_precision_of_float16(n: int, k: int, spread: float, seed: int) -> None:
    rows = random_rows(n, k, seed=seed, spread=spread)
    record = decode_record(encode_record(KEY, rows, num_tokens=2 * n + 1), key=KEY)
    assert record.num_tokens == 2 * n + 1
    for name in ("positions", "ids", "tail_logmass", "target_logprob"):
        np.testing.assert_array_equal(getattr(record.rows, name), getattr(rows, name))
    np.testing.assert_allclose(record.rows.logprobs, rows.logprobs, rtol=2**-11, atol=2**-25)
    assert np.isfinite(record.rows.logprobs).all()


def test_every_flipped_byte_is_found() -> None:
    content = encode_record(KEY, random_rows(3, 8), num_tokens=9)
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1
        with pytest.raises(CorruptRecord):
            decode_record(bytes(damaged), key=KEY)


def test_every_cut_is_found_and_so_is_another_key() -> None:
    content = encode_record(KEY, random_rows(3, 8), num_tokens=9)
    for length in range(len(content)):
        with pytest.raises(CorruptRecord):
            decode_record(content[:length], key=KEY)
    with pytest.raises(CorruptRecord, match="another key"):
        decode_record(content, key="cd" * 32)


def test_a_whole_record_of_another_version_is_refused() -> None:
    content = bytearray(encode_record(KEY, random_rows(1, 8), num_tokens=9)[:-32])
    content[4] = 2
    with pytest.raises(CorruptRecord, match="version 2"):
        decode_record(bytes(content) + blake3(content).digest(), key=KEY)


def test_a_record_longer_than_its_counts_is_refused() -> None:
    content = encode_record(KEY, random_rows(3, 8), num_tokens=9)[:-32] + b"\0" * 4
    with pytest.raises(CorruptRecord, match="3 rows of 8 ids need"):
        decode_record(content + blake3(content).digest(), key=KEY)


def test_a_log_probability_below_float16_stays_finite() -> None:
    rows = random_rows(1, 8)
    lowest = np.full_like(rows.logprobs, -1e6)
    record = decode_record(encode_record(KEY, replace(rows, logprobs=lowest), num_tokens=9), key=KEY)
    assert (record.rows.logprobs == -65504).all()
