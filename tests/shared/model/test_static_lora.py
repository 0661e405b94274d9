"""Test the static adapter alone and as the start of a hypernetwork."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hyperagent.errors import ConfigError
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.static_lora import StaticLoRA

LAYERS = (LayerInfo("layers.0.in", 48, 80), LayerInfo("layers.0.out", 80, 48), LayerInfo("layers.1.in", 48, 80))
CONFIG = HyperNetworkConfig(width=32, num_latents=4, encoder_blocks=1, generator_blocks=1, num_heads=2, rank=4, alpha=8)
MASK = torch.ones(3, 5, dtype=torch.bool)


def trained(seed: int = 0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.name: LoRAPair(
            torch.randn(4, layer.in_features, generator=generator),
            torch.randn(layer.out_features, 4, generator=generator),
        )
        for layer in LAYERS
    }


def prompts(seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(seed))


def warm() -> AgenticHyperNetwork:
    torch.manual_seed(2)
    return AgenticHyperNetwork(CONFIG, LAYERS, 24, warm_start=trained())


def test_a_static_adapter_starts_as_peft_does_and_ignores_the_prompt() -> None:
    torch.manual_seed(0)
    static = StaticLoRA(LAYERS, rank=32, alpha=64)
    assert static.scale == 2
    weights = static(prompts(), MASK)
    assert list(weights) == [layer.name for layer in LAYERS]
    for layer in LAYERS:
        pair = weights[layer.name]
        assert (pair.a.shape, pair.b.shape) == ((3, 32, layer.in_features), (3, layer.out_features, 32))
        assert torch.count_nonzero(pair.b) == 0
        # A is uniform within 1/sqrt(I).
        assert float(pair.a.detach().abs().max()) <= 1 / math.sqrt(layer.in_features)
        assert float(pair.a.detach().std()) == pytest.approx(1 / math.sqrt(3 * layer.in_features), rel=0.1)
        assert torch.equal(pair.a, static(prompts(7), MASK)[layer.name].a)
    # Each sample of the batch contributes a gradient to the same adapter.
    sum(pair.a.sum() for pair in weights.values()).backward()
    assert all(torch.equal(a.grad, torch.full_like(a, 3.0)) for a in static.a)


def test_an_adapter_goes_in_and_comes_out_the_same() -> None:
    before = trained()
    after = StaticLoRA.of(before, LAYERS, rank=4, alpha=8).adapter()
    assert all(torch.equal(before[n].a, after[n].a) and torch.equal(before[n].b, after[n].b) for n in before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers.0.in": None}, r"differ in 1 layers, such as layers\.0\.in"),
        ({"lm_head": LoRAPair(torch.zeros(4, 8), torch.zeros(8, 4))}, "differ in 1 layers, such as lm_head"),
        ({"layers.0.in": LoRAPair(torch.zeros(3, 48), torch.zeros(80, 3))}, "give one of rank 4 for this student"),
        ({"layers.0.in": LoRAPair(torch.zeros(4, 48), torch.zeros(48, 4))}, "give one of rank 4 for this student"),
        ({"layers.0.in": LoRAPair(torch.full((4, 48), torch.nan), torch.zeros(80, 4))}, "are not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change: dict[str, LoRAPair | None], reason: str) -> None:
    weights = {name: pair for name, pair in {**trained(), **change}.items() if pair is not None}
    with pytest.raises(ConfigError, match=reason):
        AgenticHyperNetwork(CONFIG, LAYERS, 24, warm_start=weights)


def test_a_warm_start_is_the_static_adapter_bit_for_bit_whatever_the_prompt() -> None:
    weights = warm()(prompts() * 100, MASK)
    for name, pair in trained().items():
        assert torch.equal(weights[name].a, pair.a.expand(3, -1, -1))
        assert torch.equal(weights[name].b, pair.b.expand(3, -1, -1))


def test_a_warm_start_teaches_both_heads_at_once_and_leaves_the_static_adapter_alone() -> None:
    network = warm()
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    inputs = torch.randn(3, 48, generator=torch.Generator().manual_seed(3))
    for step in (0, 1):
        weights = network(prompts(), MASK)
        outputs = [
            torch.einsum("bor,bri,bi->bo", weights[n].b, weights[n].a, inputs) for n in ("layers.0.in", "layers.1.in")
        ]
        back = torch.einsum("bor,bri,bi->bo", weights["layers.0.out"].b, weights["layers.0.out"].a, outputs[0])
        optimizer.zero_grad()
        (outputs[1].square().sum() + back.square().sum()).backward()
        reached = {n for n, p in network.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
        trainable = {n for n, _ in network.named_parameters() if not n.startswith("base.")}
        # Both heads are zero at first, so no parameter before them has a gradient until they have changed.
        assert reached == (trainable if step else {n for n in trainable if "_heads." in n})
        optimizer.step()
    moved = network(prompts(), MASK)
    for name, pair in trained().items():
        assert not torch.equal(moved[name].a[0], moved[name].a[1])
        assert not torch.equal(moved[name].b[0], pair.b)
    assert network.base is not None
    assert all(torch.equal(network.base.adapter()[n].a, pair.a) for n, pair in trained().items())


def test_the_static_adapter_is_among_the_weights_of_a_warm_start() -> None:
    network, other = warm(), AgenticHyperNetwork(CONFIG, LAYERS, 24, warm_start=trained(seed=9))
    other.load_state_dict(network.state_dict(), strict=True)
    for name, pair in network(prompts(), MASK).items():
        assert torch.equal(other(prompts(), MASK)[name].b, pair.b)
    from_zero = AgenticHyperNetwork(CONFIG, LAYERS, 24)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        from_zero.load_state_dict(network.state_dict(), strict=True)


def test_layers_of_one_name_cannot_stand_for_others() -> None:
    renamed = (replace(LAYERS[0], name="layers.9.in"), *LAYERS[1:])
    with pytest.raises(ConfigError, match=r"such as layers\.0\.in; give the targets it was trained with"):
        StaticLoRA.of(trained(), renamed, rank=4, alpha=8)
