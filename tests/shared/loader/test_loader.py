"""Rows of the cache as tensors: whole, in ranges, and decoded by torch as they are by numpy."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_rows import IDENTITY, TEMPERATURES, VOCABULARY, random_rows

from hyperagent.cache.format import elias_fano
from hyperagent.cache.format.codecs import CODECS, COMPACT, Codec
from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.format.record import Header, check_record, decode_block, encode_block
from hyperagent.cache.local import LocalCache
from hyperagent.errors import ConfigError, CorruptRecord, InvalidRequest, NotFound
from hyperagent.loader import rows as rows_module
from hyperagent.loader.decode import DeviceRows, decode_on_device
from hyperagent.loader.rows import load_rows

NUM_ROWS = 150
TOKENS = np.arange(2 * NUM_ROWS + 1, dtype=np.uint32)
CPU = torch.device("cpu")
COLUMNS = DeviceRows._fields
SETTINGS = [
    CacheSettings(codec=codec, kept_mass=mass, min_k=1, block_tokens=64)
    for codec in ("exact", "compact", "archive")
    for mass in (1.0, 0.7)
]


@pytest.fixture(params=SETTINGS, ids=lambda settings: f"{settings.codec}-{settings.kept_mass}")
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[LocalCache, str]]:
    with LocalCache.create_or_open(tmp_path, IDENTITY, settings=request.param) as cache:
        yield cache, cache.put(TOKENS, random_rows(NUM_ROWS, 8))


def by_id(ids: np.ndarray, logprobs: np.ndarray) -> list[dict[int, float]]:
    return [
        {int(i): float(p) for i, p in zip(row, values, strict=True) if p > -np.inf}
        for row, values in zip(ids, logprobs, strict=True)
    ]


def test_tensors_hold_what_the_cache_holds(filled: tuple[LocalCache, str]) -> None:
    cache, key = filled
    rows, tensors = cache.get(key).rows, load_rows(cache, key)
    assert [getattr(tensors, name).dtype for name in COLUMNS] == [
        torch.int32, torch.int32, torch.float32, torch.float32, torch.float32, torch.float32,
    ]  # fmt: skip
    np.testing.assert_array_equal(tensors.positions_N, rows.positions)
    assert by_id(tensors.ids_NK.numpy(), tensors.logprobs_NK.numpy()) == by_id(rows.ids, rows.logprobs)
    np.testing.assert_array_equal(tensors.tail_logmass_N, rows.tail_logmass)
    np.testing.assert_array_equal(tensors.target_logprob_N, rows.target_logprob)
    is_padding = tensors.logprobs_NK == -torch.inf
    assert (tensors.ids_NK == tensors.ids_NK[:, :1])[is_padding].all()
    assert bool(is_padding.any()) == (cache.settings.kept_mass < 1)
    np.testing.assert_array_equal(tensors.tail_logsumexps_NM, rows.tail_logsumexps)
    normalized = tensors.at_temperature()
    mass = normalized.logprobs_NK.double().exp().sum(dim=1) + normalized.tail_logmass_N.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, *TEMPERATURES])
def test_rows_at_a_temperature_are_the_whole_softmax_at_it(filled: tuple[LocalCache, str], temperature: float) -> None:
    cache, key = filled
    found = load_rows(cache, key).at_temperature(temperature)
    # The distributions that `random_rows` cuts, whole, and softened over all of the vocabulary.
    logits = np.random.default_rng(0).normal(size=(NUM_ROWS, VOCABULARY)) * 3.0 / temperature
    whole = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    total = np.zeros(NUM_ROWS)
    for row in range(NUM_ROWS):
        kept = found.logprobs_NK[row] > -torch.inf
        ids = found.ids_NK[row][kept].long().numpy()
        expected = np.append(whole[row, ids], 1 - whole[row, ids].sum())
        stored = np.append(found.logprobs_NK[row][kept].numpy(), found.tail_logmass_N[row])
        total[row] = (expected * (np.log(expected) - stored)).sum()
        assert np.exp(stored.astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)
    # What is left is the codec's rounding: far from the 0.01 to 1 that guessing the tail from its mass would cost.
    assert 0 <= total.mean() < {"exact": 1e-6, "compact": 2e-5, "archive": 5e-4}[cache.settings.codec]


def test_a_temperature_that_the_teacher_did_not_record_is_refused(filled: tuple[LocalCache, str]) -> None:
    cache, key = filled
    with pytest.raises(ConfigError, match=r"has rows at temperatures 1, 0\.5, 2, not at 3;"):
        load_rows(cache, key).at_temperature(3.0)


def test_torch_decodes_every_block_to_the_bits_that_numpy_does(filled: tuple[LocalCache, str]) -> None:
    cache, key = filled
    blocks = cache.trajectory(key).blocks
    assert len(blocks) == 5
    parts = [
        decode_on_device(header, payload, vocab_size=IDENTITY.vocab_size, num_temperatures=2, device=CPU)
        for header, payload in cache.records_of([block.key for block in blocks])
    ]
    for column, expected in zip(
        zip(*parts, strict=True), (getattr(load_rows(cache, key), name) for name in COLUMNS),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(torch.cat(column), expected)


@pytest.mark.parametrize("vocab_size", [VOCABULARY, 3_000, 70_000, 151_936, 1 << 21])
@pytest.mark.parametrize("top_k", [1, 5, 64])
@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
def test_torch_decodes_what_suits_any_vocabulary(codec: Codec, top_k: int, vocab_size: int) -> None:
    rows = random_rows(20, top_k)
    # Spread over the vocabulary, so that gaps and numbers are as wide as they get.
    rows = replace(rows, ids=rows.ids * np.uint32(vocab_size // VOCABULARY))
    content = encode_block(bytes(32), rows, first_token=0, num_tokens=40, codec=codec, vocab_size=vocab_size)
    header, payload = check_record(memoryview(content))
    found = decode_on_device(header, payload, vocab_size=vocab_size, num_temperatures=2, device=CPU)
    stored = decode_block(header, payload, vocab_size=vocab_size, num_temperatures=2)
    np.testing.assert_array_equal(found.ids_NK.flatten(), stored.kept.ids_n)
    np.testing.assert_array_equal(found.logprobs_NK.flatten(), stored.kept.logprobs_n)
    np.testing.assert_array_equal(found.tail_logsumexps_NM, stored.tail_logsumexps_NM)


def test_the_way_to_a_gpu_gives_the_rows_of_the_way_to_the_host(filled: tuple[LocalCache, str]) -> None:
    cache, key = filled
    blocks = cache.trajectory(key).blocks
    for chosen in (blocks, blocks[1:3], blocks[:0]):
        there = rows_module._decode_on_device(cache, chosen, CPU)
        here = rows_module._decode_on_host(cache, chosen, pinned=False)
        for name in COLUMNS:
            assert torch.equal(getattr(there, name), getattr(here, name))
            assert getattr(there, name).dtype == getattr(here, name).dtype


def test_ids_that_lack_a_bit_are_refused_by_torch_too() -> None:
    rows = random_rows(20, 8)
    content = encode_block(bytes(32), rows, first_token=0, num_tokens=40, codec=COMPACT, vocab_size=VOCABULARY)
    header, payload = check_record(memoryview(content))
    damaged = bytearray(payload)
    place = 6 * 20 + 160 + elias_fano.encoded_bytes(160, 20 * VOCABULARY) - 2
    while not damaged[place]:
        place -= 1
    damaged[place] &= damaged[place] - 1
    with pytest.raises(CorruptRecord, match="holds 159 ids where 160 belong"):
        decode_on_device(header, memoryview(damaged), vocab_size=VOCABULARY, num_temperatures=2, device=CPU)


def test_a_payload_that_is_not_what_its_header_says_is_refused(filled: tuple[LocalCache, str]) -> None:
    cache, key = filled
    (record,) = cache.records_of([cache.trajectory(key).blocks[0].key])
    header, payload = record
    wrong: list[tuple[Header, memoryview]] = [(header, payload[:size]) for size in range(len(payload))]
    wrong += [(replace(header, num_rows=header.num_rows + change), payload) for change in (-1, 1)]
    wrong += [(replace(header, num_kept=header.num_kept + change), payload) for change in (-1, 1)]
    wrong.append((replace(header, codec=9), payload))
    for damaged in wrong:
        with pytest.raises(CorruptRecord):
            decode_on_device(*damaged, vocab_size=IDENTITY.vocab_size, num_temperatures=2, device=CPU)


def test_a_range_of_tokens(filled: tuple[LocalCache, str]) -> None:
    cache, key = filled
    whole = load_rows(cache, key)
    for first, end in [(0, 301), (0, 1), (1, 2), (63, 65), (64, 128), (65, 300), (300, 301), (7, 7)]:
        part = load_rows(cache, key, first_token=first, end_token=end)
        inside = (whole.positions_N >= first) & (whole.positions_N < end)
        for name in COLUMNS:
            assert torch.equal(getattr(part, name), getattr(whole, name)[inside])
    for first, end in [(-1, 3), (5, 4), (0, 302)]:
        with pytest.raises(InvalidRequest, match="are not a range of a trajectory of 301 tokens"):
            load_rows(cache, key, first_token=first, end_token=end)
    with pytest.raises(NotFound):
        load_rows(cache, "0" * 64)


def test_another_process_opens_the_cache_for_itself(filled: tuple[LocalCache, str]) -> None:
    cache, key = filled
    with pickle.loads(pickle.dumps(cache)) as other:  # noqa: S301  # what multiprocessing does with what is ours
        assert other.root == cache.root
        assert torch.equal(load_rows(other, key).ids_NK, load_rows(cache, key).ids_NK)
