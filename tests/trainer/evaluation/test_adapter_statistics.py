"""Test sizes and cosines of generated adapters against explicitly computed deltas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hyperagent.model.adapter import LoRAPair
from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent_trainer.evaluation.adapter_statistics import adapter_statistics, gradient_norms, weight_norms

LAYERS = [LayerInfo("layers.0.q", 12, 20), LayerInfo("layers.1.q", 12, 20), LayerInfo("layers.1.out", 20, 12)]
SCALE = 1.5


def test_sizes_and_cosines_are_those_of_the_deltas() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = {
        layer.name: LoRAPair(
            torch.randn(3, 4, layer.in_features, generator=generator),
            torch.randn(3, layer.out_features, 4, generator=generator),
        )
        for layer in LAYERS
    }
    found = adapter_statistics(
        adapters, LAYERS, {"layers.0.q": 3.0, "layers.1.q": 5.0, "layers.1.out": 7.0}, scale=SCALE
    )

    deltas = {name: SCALE * pair.b.double() @ pair.a.double() for name, pair in adapters.items()}
    norms = {name: delta.flatten(1).norm(dim=1) for name, delta in deltas.items()}
    expected = torch.cat([norms["layers.0.q"] / 3, norms["layers.1.q"] / 5]).square().mean().sqrt()
    assert found.relative_norm["q"] == pytest.approx(float(expected), rel=1e-6)
    assert found.relative_norm["out"] == pytest.approx(
        float((norms["layers.1.out"] / 7).square().mean().sqrt()), rel=1e-6
    )
    whole = torch.cat([delta.flatten(1) for delta in deltas.values()], dim=1)
    cosines = [torch.cosine_similarity(whole[i], whole[j], dim=0) for i in range(3) for j in range(i)]
    assert found.cosine == pytest.approx(float(sum(cosines)) / 3, rel=1e-6)


def test_one_adapter_for_all_prompts_has_a_cosine_of_1_and_no_adapter_has_none() -> None:
    one = {
        layer.name: LoRAPair(torch.ones(2, 1, layer.in_features), torch.ones(2, layer.out_features, 1))
        for layer in LAYERS
    }
    sizes = dict.fromkeys(one, 1.0)
    assert adapter_statistics(one, LAYERS, sizes, scale=1).cosine == pytest.approx(1)
    zero = {name: LoRAPair(pair.a, torch.zeros_like(pair.b)) for name, pair in one.items()}
    untrained = adapter_statistics(zero, LAYERS, sizes, scale=1)
    assert untrained.cosine is None
    assert set(untrained.relative_norm.values()) == {0.0}


def test_gradient_norms_are_separate_for_each_part() -> None:
    config = HyperNetworkConfig(width=16, num_latents=2, encoder_blocks=1, generator_blocks=1, num_heads=2, rank=2)
    network = AgenticHyperNetwork(config, LAYERS, 8)
    for number, (_, parameter) in enumerate(network.named_parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    found = gradient_norms(network)
    heads = {f"{side}_heads.{shape}" for side in "ab" for shape in ("12x20", "20x12")}
    assert found.keys() == {"encoder", "generator", *heads}
    total = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()
    assert sum(v**2 for v in found.values()) ** 0.5 == pytest.approx(float(total), rel=1e-6)


def test_norms_of_the_weights() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4)})
    assert weight_norms(model, [LayerInfo("a", 3, 4)]) == {"a": pytest.approx(float(model["a"].weight.detach().norm()))}
