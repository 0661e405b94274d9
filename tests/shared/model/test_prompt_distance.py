"""Test the distance from the training prompts against its definition, and what it recognizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load
from safetensors.numpy import save as encode
from torch.nn.utils.rnn import pad_sequence

from hyperagent.errors import CorruptRecord, DataError
from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.featurizer import EmbeddingFeaturizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.prompt_distance import PromptStatistics, prompt_statistics, shrunken_covariance

WIDTH, EMBEDDING_SIZE, NUM_IDS = 64, 64, 60
CONFIG = HyperNetworkConfig(
    width=WIDTH, num_latents=3, encoder_blocks=1, generator_blocks=1, num_heads=2, rank=2, alpha=4, neighbors=2
)
Prompt = NDArray[np.uint32]


@pytest.fixture(scope="module")
def network() -> AgenticHyperNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        common_V = torch.zeros(NUM_IDS, dtype=torch.bool)
        common_V[:3] = True
        return AgenticHyperNetwork(
            CONFIG, (LayerInfo("model.layers.0.q_proj", 16, 24),), EMBEDDING_SIZE, common_V=common_V
        )


@pytest.fixture(scope="module")
def featurizer() -> EmbeddingFeaturizer:
    return EmbeddingFeaturizer(torch.randn(NUM_IDS, EMBEDDING_SIZE, generator=torch.Generator().manual_seed(1)))


def task_prompts(count: int, *, seed: int) -> list[Prompt]:
    """Return prompts with a common frame (ids 0 to 2) and five to eight places, each with four words of its own."""
    generator = np.random.default_rng(seed)
    return [
        np.array(
            [0, 1, *(3 + 4 * place + generator.integers(4) for place in range(generator.integers(5, 9))), 2], np.uint32
        )
        for _ in range(count)
    ]


def foreign_prompts(count: int, *, seed: int) -> list[Prompt]:
    """Return prompts with the same frame and lengths, and words that no task prompt has."""
    generator = np.random.default_rng(seed)
    return [
        np.array([0, 1, *generator.integers(40, NUM_IDS, generator.integers(5, 9)), 2], np.uint32) for _ in range(count)
    ]


@torch.no_grad()
def features(
    network: AgenticHyperNetwork, featurizer: EmbeddingFeaturizer, prompts: Sequence[Prompt]
) -> NDArray[np.float64]:
    """Return the features [N, D] of prompts that are computed in one padded batch, with padding of a real id."""
    ids = pad_sequence([torch.from_numpy(p.astype(np.int64)) for p in prompts], batch_first=True, padding_value=7)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor([len(p) for p in prompts])[:, None]
    return network.encoder(featurizer(ids), network.readable(ids, mask)).mean(1).double().numpy()


def ledoit_wolf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the estimate as Ledoit and Wolf (2004) write it down: sums over prompts, scalar products over dimensions."""
    num, dim = x.shape
    centered = [row - x.mean(0) for row in x]
    sample = sum(np.outer(row, row) for row in centered) / num

    def product(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(np.trace(a @ b.T)) / dim

    identity = np.eye(dim)
    m = product(sample, identity)
    d2 = product(sample - m * identity, sample - m * identity)
    b2 = min(d2, sum(product(np.outer(r, r) - sample, np.outer(r, r) - sample) for r in centered) / num**2)
    return b2 / d2 * m * identity + (d2 - b2) / d2 * sample


@pytest.mark.parametrize(("num", "dim"), [(5, 16), (40, 16), (500, 8)])
def test_the_covariance_is_that_of_ledoit_and_wolf(num: int, dim: int) -> None:
    generator = np.random.default_rng(num)
    x = generator.standard_normal((num, dim)) @ generator.standard_normal((dim, dim)) + 3.0
    found = shrunken_covariance(x)
    np.testing.assert_allclose(found, ledoit_wolf(x), rtol=1e-10, atol=1e-12)
    assert np.linalg.eigvalsh(found).min() > 0


def test_the_distance_is_the_shrunken_mahalanobis_distance_whatever_the_padding(
    network: AgenticHyperNetwork, featurizer: EmbeddingFeaturizer
) -> None:
    training, held_out = task_prompts(50, seed=0), task_prompts(20, seed=1)
    statistics = prompt_statistics(network, featurizer, training, held_out)
    x = features(network, featurizer, training)
    covariance, mean = ledoit_wolf(x), x.mean(0)
    others = features(network, featurizer, [*held_out, *foreign_prompts(5, seed=2)])
    expected = [np.sqrt((o - mean) @ np.linalg.solve(covariance, o - mean) / WIDTH) for o in others]
    # Features of float32 that are computed in another batch differ by 1e-7 of their size, 3e-6 of their deviations.
    np.testing.assert_allclose([statistics.distance(o) for o in others], expected, rtol=1e-4)
    np.testing.assert_allclose(statistics.quantiles_Q, np.quantile(expected[:20], np.linspace(0, 1, 101)), rtol=1e-4)
    assert statistics.threshold == pytest.approx(max(expected[:20]), rel=1e-4)
    assert (statistics.num_training, statistics.num_held_out) == (50, 20)


def test_one_in_a_hundred_prompts_like_the_training_prompts_is_unusual_and_every_foreign_one(
    network: AgenticHyperNetwork, featurizer: EmbeddingFeaturizer
) -> None:
    statistics = prompt_statistics(network, featurizer, task_prompts(400, seed=0), task_prompts(300, seed=1))
    assert statistics.threshold == pytest.approx(statistics.quantiles_Q[99])
    assert statistics.threshold < statistics.quantiles_Q[100]
    new = [statistics.novelty(x) for x in features(network, featurizer, task_prompts(1000, seed=2))]
    # With the threshold exactly at 1%, at most 23 of 1000 are above it with a probability of 99.98%; the threshold's own
    # error, three of 300 prompts, allows twice as many.
    assert 1 <= sum(novelty.is_unusual for novelty in new) <= 30
    assert np.mean([novelty.share_nearer for novelty in new]) == pytest.approx(0.5, abs=0.06)
    foreign = [statistics.novelty(x) for x in features(network, featurizer, foreign_prompts(100, seed=3))]
    assert np.mean([novelty.is_unusual for novelty in foreign]) > 0.9
    assert np.median([novelty.distance for novelty in foreign]) > 1.2 * statistics.threshold


def test_with_fewer_than_a_hundred_held_out_prompts_none_of_them_is_unusual(
    network: AgenticHyperNetwork, featurizer: EmbeddingFeaturizer
) -> None:
    held_out = task_prompts(99, seed=1)
    statistics = prompt_statistics(network, featurizer, task_prompts(100, seed=0), held_out)
    assert statistics.threshold == statistics.quantiles_Q[100]
    distances = [statistics.distance(x) for x in features(network, featurizer, held_out)]
    assert max(distances) == pytest.approx(statistics.threshold, rel=1e-4)


def test_the_share_of_nearer_prompts_is_read_off_the_quantiles() -> None:
    quantiles = np.concatenate([np.linspace(1, 2, 51), np.linspace(2.1, 7, 50)])
    statistics = PromptStatistics(np.zeros(4), np.eye(4), quantiles, 6.9, 10, 10)
    for distance, share in ((0.5, 0.0), (1.0, 0.0), (1.5, 0.25), (2.0, 0.5), (7.0, 1.0), (99.0, 1.0)):
        found = statistics.novelty(np.full(4, distance, np.float32))
        assert found.distance == pytest.approx(distance)
        assert found.share_nearer == pytest.approx(share)
        assert found.is_unusual == (distance > 6.9)


def test_prompts_that_determine_no_distance_are_refused(
    network: AgenticHyperNetwork, featurizer: EmbeddingFeaturizer
) -> None:
    prompts = task_prompts(3, seed=0)
    with pytest.raises(DataError, match="no held-out prompt to calibrate distances with; hold out a repository"):
        prompt_statistics(network, featurizer, prompts, [])
    for same in ([], prompts[:1], prompts[:1] * 9):
        with pytest.raises(DataError, match=f"the {len(same)} training prompts have the same features"):
            prompt_statistics(network, featurizer, same, prompts)
    # Two prompts are enough, though they leave every other direction undetermined.
    statistics = prompt_statistics(network, featurizer, prompts[:2], prompts[2:])
    assert np.isfinite(statistics.threshold)


def test_statistics_are_read_as_they_were_written(
    network: AgenticHyperNetwork, featurizer: EmbeddingFeaturizer
) -> None:
    statistics = prompt_statistics(network, featurizer, task_prompts(20, seed=0), task_prompts(5, seed=1))
    read = PromptStatistics.decode(statistics.encode(), width=WIDTH)
    assert read.encode() == statistics.encode()
    x = features(network, featurizer, foreign_prompts(1, seed=2))[0]
    assert read.novelty(x) == statistics.novelty(x)
    assert (read.num_training, read.num_held_out, read.threshold) == (20, 5, statistics.threshold)


def test_a_file_of_other_statistics_is_refused(network: AgenticHyperNetwork, featurizer: EmbeddingFeaturizer) -> None:
    statistics = prompt_statistics(network, featurizer, task_prompts(20, seed=0), task_prompts(5, seed=1))
    content = statistics.encode()
    with pytest.raises(CorruptRecord, match="cannot be read"):
        PromptStatistics.decode(content[:-1], width=WIDTH)
    with pytest.raises(CorruptRecord, match="export the bundle again"):
        PromptStatistics.decode(content, width=WIDTH * 2)
    with pytest.raises(CorruptRecord, match="export the bundle again"):
        PromptStatistics.decode(replace(statistics, threshold=float("nan")).encode(), width=WIDTH)
    tensors = load(content)
    del tensors["quantiles"]
    with pytest.raises(CorruptRecord, match="export the bundle again"):
        PromptStatistics.decode(encode(tensors), width=WIDTH)
