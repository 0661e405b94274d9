"""Rows of the cache as tensors: whole, in ranges, and decoded by torch as they are by numpy."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_rows import IDENTITY, random_rows

from hyperagent.cache.manifest import CacheSettings
from hyperagent.cache.record import Header
from hyperagent.cache.store import TopKCache
from hyperagent.errors import CorruptRecord, InvalidRequest, NotFound
from hyperagent.loader.decode import decode_on_device
from hyperagent.loader.rows import RowTensors, load_rows

NUM_ROWS = 150
TOKENS = np.arange(2 * NUM_ROWS + 1, dtype=np.uint32)
CPU = torch.device("cpu")
SETTINGS = [
    CacheSettings(codec=codec, kept_mass=mass, min_k=1, block_tokens=64)
    for codec in ("exact", "compact", "archive")
    for mass in (1.0, 0.7)
]


@pytest.fixture(params=SETTINGS, ids=lambda settings: f"{settings.codec}-{settings.kept_mass}")
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[TopKCache, str]]:
    with TopKCache.create_or_open(tmp_path, IDENTITY, settings=request.param) as cache:
        yield cache, cache.put(TOKENS, random_rows(NUM_ROWS, 8))


def by_id(ids: np.ndarray, logprobs: np.ndarray) -> list[dict[int, float]]:
    return [
        {int(i): float(p) for i, p in zip(row, values, strict=True) if p > -np.inf}
        for row, values in zip(ids, logprobs, strict=True)
    ]


def test_tensors_hold_what_the_cache_holds(filled: tuple[TopKCache, str]) -> None:
    cache, key = filled
    rows, tensors = cache.get(key).rows, load_rows(cache, key)
    assert [getattr(tensors, field.name).dtype for field in fields(RowTensors)] == [
        torch.int32, torch.int32, torch.float32, torch.float32, torch.float32,
    ]  # fmt: skip
    np.testing.assert_array_equal(tensors.positions_N, rows.positions)
    assert by_id(tensors.ids_NK.numpy(), tensors.logprobs_NK.numpy()) == by_id(rows.ids, rows.logprobs)
    np.testing.assert_array_equal(tensors.tail_logmass_N, rows.tail_logmass)
    np.testing.assert_array_equal(tensors.target_logprob_N, rows.target_logprob)
    is_padding = tensors.logprobs_NK == -torch.inf
    assert (tensors.ids_NK == tensors.ids_NK[:, :1])[is_padding].all()
    assert bool(is_padding.any()) == (cache.settings.kept_mass < 1)
    normalised = tensors.normalised()
    mass = normalised.logprobs_NK.double().exp().sum(dim=1) + normalised.tail_logmass_N.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)


def test_torch_decodes_every_block_to_the_bits_that_numpy_does(filled: tuple[TopKCache, str]) -> None:
    cache, key = filled
    blocks = cache.trajectory(key).blocks
    assert len(blocks) == 5
    parts = [
        decode_on_device(header, payload, vocab_size=IDENTITY.vocab_size, device=CPU)
        for header, payload in cache.records_of([block.key for block in blocks])
    ]
    for column, expected in zip(
        zip(*parts, strict=True), (getattr(load_rows(cache, key), field.name) for field in fields(RowTensors)),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(torch.cat(column), expected)


def test_a_payload_that_is_not_what_its_header_says_is_refused(filled: tuple[TopKCache, str]) -> None:
    cache, key = filled
    (record,) = cache.records_of([cache.trajectory(key).blocks[0].key])
    header, payload = record
    wrong: list[tuple[Header, memoryview]] = [(header, payload[:size]) for size in range(len(payload))]
    wrong += [(replace(header, num_rows=header.num_rows + change), payload) for change in (-1, 1)]
    wrong += [(replace(header, num_kept=header.num_kept + change), payload) for change in (-1, 1)]
    wrong.append((replace(header, codec=9), payload))
    for damaged in wrong:
        with pytest.raises(CorruptRecord):
            decode_on_device(*damaged, vocab_size=IDENTITY.vocab_size, device=CPU)


def test_a_range_of_tokens(filled: tuple[TopKCache, str]) -> None:
    cache, key = filled
    whole = load_rows(cache, key)
    for first, end in [(0, 301), (0, 1), (1, 2), (63, 65), (64, 128), (65, 300), (300, 301), (7, 7)]:
        part = load_rows(cache, key, first_token=first, end_token=end)
        inside = (whole.positions_N >= first) & (whole.positions_N < end)
        for field in fields(RowTensors):
            assert torch.equal(getattr(part, field.name), getattr(whole, field.name)[inside])
    for first, end in [(-1, 3), (5, 4), (0, 302)]:
        with pytest.raises(InvalidRequest, match="are not a range of a trajectory of 301 tokens"):
            load_rows(cache, key, first_token=first, end_token=end)
    with pytest.raises(NotFound):
        load_rows(cache, "0" * 64)


def test_another_process_opens_the_cache_for_itself(filled: tuple[TopKCache, str]) -> None:
    cache, key = filled
    with pickle.loads(pickle.dumps(cache)) as other:  # noqa: S301  # what multiprocessing does with what is ours
        assert other.root == cache.root
        assert torch.equal(load_rows(other, key).ids_NK, load_rows(cache, key).ids_NK)
