"""Test reading rows of the cache as tensors: whole, in ranges, and at other temperatures."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_rows import IDENTITY, TEMPERATURES, VOCABULARY, random_rows

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.local import LocalCache
from hyperagent.errors import ConfigError, InvalidRequest, NotFound
from hyperagent_trainer.data.row_loader import load_rows

NUM_ROWS = 150
TOKENS = np.arange(2 * NUM_ROWS + 1, dtype=np.uint32)
CPU = torch.device("cpu")
COLUMNS = ("ids_NK", "logprobs_NK", "tail_logmass_N", "tail_logsumexps_NM")
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
        torch.int64, torch.float32, torch.float32, torch.float32,
    ]  # fmt: skip
    assert by_id(tensors.ids_NK.numpy(), tensors.logprobs_NK.numpy()) == by_id(rows.ids, rows.logprobs)
    np.testing.assert_array_equal(tensors.tail_logmass_N, rows.tail_logmass)
    is_padding = tensors.logprobs_NK == -torch.inf
    assert (tensors.ids_NK == tensors.ids_NK[:, :1])[is_padding].all()
    assert bool(is_padding.any()) == (cache.settings.kept_mass < 1)
    np.testing.assert_array_equal(tensors.tail_logsumexps_NM, rows.tail_logsumexps)
    assert (tensors.temperature, tensors.other_temperatures) == (1, TEMPERATURES)
    normalized = tensors.at_temperature(1.0)
    mass = normalized.logprobs_NK.double().exp().sum(dim=1) + normalized.tail_logmass_N.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, *TEMPERATURES])
def test_rows_at_a_temperature_are_the_whole_softmax_at_it(filled: tuple[LocalCache, str], temperature: float) -> None:
    cache, key = filled
    found = load_rows(cache, key).at_temperature(temperature)
    # The whole distributions that `random_rows` truncates, softened over all of the vocabulary.
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
    # Only the codec's rounding is left; guessing the tail from its mass would give errors of 0.01 to 1.
    assert 0 <= total.mean() < {"exact": 1e-6, "compact": 2e-5, "archive": 5e-4}[cache.settings.codec]


def test_a_temperature_that_the_teacher_did_not_record_is_refused(filled: tuple[LocalCache, str]) -> None:
    cache, key = filled
    with pytest.raises(ConfigError, match=r"has rows at temperatures 1, 0\.5, 2, not at 3;"):
        load_rows(cache, key).at_temperature(3.0)


def test_a_range_of_tokens(filled: tuple[LocalCache, str]) -> None:
    cache, key = filled
    whole, positions = load_rows(cache, key), cache.get(key).rows.positions
    for first, end in [(0, 301), (0, 1), (1, 2), (63, 65), (64, 128), (65, 300), (300, 301), (7, 7)]:
        part = load_rows(cache, key, first_token=first, end_token=end)
        inside = torch.from_numpy((positions >= first) & (positions < end))
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
