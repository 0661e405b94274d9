"""The hypernetwork by itself: what it reads of a prompt, how it starts, and which shapes it accepts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hyperagent.model.adapter import AdapterWeights
from hyperagent.model.hypernetwork import AgenticHyperNetwork, HyperNetworkConfig
from hyperagent.model.targets import LayerInfo

LAYERS = (
    LayerInfo("layers.0.in", 48, 80),
    LayerInfo("layers.0.out", 80, 48),
    LayerInfo("layers.1.in", 48, 80),
    LayerInfo("layers.1.square", 48, 48),
)
EMBEDDING_SIZE = 24


def config(**changes: Any) -> HyperNetworkConfig:
    shape = {"width": 64, "num_latents": 6, "encoder_blocks": 2, "generator_blocks": 1, "num_heads": 4, "rank": 4}
    return HyperNetworkConfig(**{**shape, **changes})


@pytest.fixture
def network() -> AgenticHyperNetwork:
    """With heads for B that are not zero, as after training."""
    torch.manual_seed(0)
    made = AgenticHyperNetwork(config(), LAYERS, EMBEDDING_SIZE)
    for head in made.generator.b_heads.parameters():
        torch.nn.init.normal_(head)
    return made.eval().requires_grad_(False)


def close(one: AdapterWeights, one_index: int, other: AdapterWeights, other_index: int) -> bool:
    return all(
        torch.allclose(getattr(one[name], side)[one_index], getattr(other[name], side)[other_index], atol=1e-5)
        for name in one
        for side in ("a", "b")
    )


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def test_one_pair_of_factors_for_every_layer_in_its_shape(network: AgenticHyperNetwork) -> None:
    weights = network(torch.randn(3, 5, EMBEDDING_SIZE), ones(3, 5))
    assert list(weights) == [layer.name for layer in LAYERS]
    for layer in LAYERS:
        assert weights[layer.name].a.shape == (3, 4, layer.in_features)
        assert weights[layer.name].b.shape == (3, layer.out_features, 4)
    # Layers of one shape share their heads, and still get factors of their own.
    assert len(network.generator.a_heads) == 3
    assert not torch.allclose(weights["layers.0.in"].a, weights["layers.1.in"].a, atol=1e-2)


def test_a_batch_of_unequal_prompts_equals_each_alone(network: AgenticHyperNetwork) -> None:
    prompts = [torch.randn(length, EMBEDDING_SIZE) for length in (1, 7, 12)]
    # What stands in the padding is noise, not zeros, which could hide a mask that is not applied.
    batch, mask = torch.randn(3, 12, EMBEDDING_SIZE) * 50, torch.zeros(3, 12, dtype=torch.bool)
    for number, prompt in enumerate(prompts):
        batch[number, : len(prompt)] = prompt
        mask[number, : len(prompt)] = True
    together = network(batch, mask)
    latents = network.encoder(batch, mask)
    for number, prompt in enumerate(prompts):
        alone = network(prompt[None], ones(1, len(prompt)))
        assert close(together, number, alone, 0)
        torch.testing.assert_close(latents[number], network.encoder(prompt[None], ones(1, len(prompt)))[0])


def test_the_order_of_the_prompt_matters(network: AgenticHyperNetwork) -> None:
    prompt = torch.randn(1, 9, EMBEDDING_SIZE)
    assert not close(network(prompt, ones(1, 9)), 0, network(prompt.flip(1), ones(1, 9)), 0)
    assert close(network(prompt, ones(1, 9)), 0, network(prompt.clone(), ones(1, 9)), 0)


def test_a_long_prompt_stays_finite(network: AgenticHyperNetwork) -> None:
    for pair in network(torch.randn(1, 20_000, EMBEDDING_SIZE), ones(1, 20_000)).values():
        assert pair.a.isfinite().all()
        assert pair.b.isfinite().all()


def test_it_starts_as_peft_does() -> None:
    """B zero, A with the spread of PEFT's kaiming_uniform_(a=sqrt(5)), which is uniform within 1/sqrt(I)."""
    torch.manual_seed(1)
    network = AgenticHyperNetwork(config(rank=32), LAYERS, EMBEDDING_SIZE)
    with torch.no_grad():
        weights = network(torch.randn(4, 5, EMBEDDING_SIZE), ones(4, 5))
    for layer in LAYERS:
        assert torch.count_nonzero(weights[layer.name].b) == 0
        reference = torch.empty(512, layer.in_features)
        torch.nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
        assert float(weights[layer.name].a.std()) == pytest.approx(float(reference.std()), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide width=64"),
        ({"width": 24}, "multiple of 16"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"alpha": 0}, "greater than 0"),
        ({"depth": 2}, "Extra inputs"),
    ],
)
def test_shapes_that_cannot_work_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        config(**changes)


def test_the_delta_is_scaled_as_in_peft() -> None:
    assert config(rank=8, alpha=32).scale == 4
