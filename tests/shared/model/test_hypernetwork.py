"""Test the hypernetwork alone: what it reads of a prompt, its initialization and the shapes it accepts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hyperagent.errors import InvalidRequest
from hyperagent.model.adapter import AdapterWeights
from hyperagent.model.config import PRESETS, HyperNetworkConfig, LayerInfo
from hyperagent.model.hypernetwork import AgenticHyperNetwork

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
    """Return a hypernetwork whose heads of B are not zero, as after training."""
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
    # Layers of one shape share their heads but still get different factors.
    assert len(network.generator.a_heads) == 3
    assert not torch.allclose(weights["layers.0.in"].a, weights["layers.1.in"].a, atol=1e-2)


def test_a_batch_of_unequal_prompts_equals_each_alone(network: AgenticHyperNetwork) -> None:
    prompts = [torch.randn(length, EMBEDDING_SIZE) for length in (1, 7, 12)]
    # The padding is noise rather than zeros, which could hide a mask that is not applied.
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
    for pair in network(torch.randn(1, 40_000, EMBEDDING_SIZE), ones(1, 40_000)).values():
        assert pair.a.isfinite().all()
        assert pair.b.isfinite().all()


def test_it_starts_as_peft_does() -> None:
    """B is zero, and A has the spread of PEFT's kaiming_uniform_(a=sqrt(5)), which is uniform within 1/sqrt(I)."""
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


def real_layers() -> list[LayerInfo]:
    """Return the default targets of the 48-layer student; tests/shared/model/test_targets.py compares them with the model."""
    attention = [("q_proj", 2048, 8192), ("k_proj", 2048, 512), ("v_proj", 2048, 512), ("o_proj", 4096, 2048)]
    delta = [("in_proj_qkvz", 2048, 12_288), ("out_proj", 4096, 2048)]
    return [
        LayerInfo(f"model.layers.{i}.{part}.{name}", inputs, outputs)
        for i in range(48)
        for part, names in [("self_attn", attention) if i % 4 == 3 else ("linear_attn", delta)]
        for name, inputs, outputs in names
    ]


@pytest.mark.parametrize(
    ("preset", "encoder", "generator", "heads"),
    [
        ("tiny", 265_536, 205_312, 2_129_920),
        ("small", 2_635_008, 3_116_800, 8_519_680),
        ("base", 69_297_152, 64_903_168, 34_078_720),
        ("flat", 2_635_008, 2_130_688, 136_314_880),
    ],
)
def test_a_preset_has_the_parameters_its_docstring_says(preset: str, encoder: int, generator: int, heads: int) -> None:
    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    layers = real_layers()
    with torch.device("meta"):
        network = AgenticHyperNetwork(HyperNetworkConfig.preset(preset), layers, 2048)
    assert size(network.encoder) == encoder
    assert size(network.generator.a_heads) + size(network.generator.b_heads) == heads
    assert size(network.generator) == generator + heads
    assert size(network) == encoder + generator + heads
    documented = next(line for line in (HyperNetworkConfig.__doc__ or "").splitlines() if line.split()[:1] == [preset])
    assert documented.split()[3:] == [f"{n:,}" for n in (encoder, generator, heads, encoder + generator + heads)]


def test_presets_are_named_in_recipes_and_changed_field_by_field() -> None:
    assert set(PRESETS) == {"tiny", "small", "base", "flat"}
    assert HyperNetworkConfig() == HyperNetworkConfig.preset("base")
    changed = HyperNetworkConfig.model_validate({"preset": "tiny", "rank": 8})
    assert changed == HyperNetworkConfig.preset("tiny", rank=8)
    assert (changed.width, changed.rank) == (64, 8)
    # A manifest stores the shape itself, so that a preset may change without changing old bundles.
    assert HyperNetworkConfig.model_validate(changed.model_dump()) == changed
    assert "preset" not in changed.model_dump()
    with pytest.raises(ValidationError, match="there is no preset 'huge'; choose from tiny, small, base, flat"):
        HyperNetworkConfig.preset("huge")


@pytest.mark.parametrize("changes", [{}, {"head": "flat"}, {"head_grouping": "kind"}])
def test_the_delta_is_zero_bit_for_bit_at_the_start(changes: dict[str, Any]) -> None:
    torch.manual_seed(2)
    network = AgenticHyperNetwork(config(**changes), LAYERS, EMBEDDING_SIZE)
    prompts = torch.cat([torch.randn(3, 5, EMBEDDING_SIZE), torch.zeros(1, 5, EMBEDDING_SIZE)]) * 1e4
    for layer in LAYERS:
        pair = network(prompts, ones(4, 5))[layer.name]
        assert (pair.a.shape, pair.b.shape) == ((4, 4, layer.in_features), (4, layer.out_features, 4))
        assert torch.equal(pair.b, torch.zeros_like(pair.b))
        assert float(pair.a.detach().abs().max()) > 0


def test_layers_share_heads_by_shape_or_by_kind() -> None:
    layers = [layer for layer in real_layers() if layer.depth >= 44]
    with torch.device("meta"):
        by_shape, by_kind = (
            AgenticHyperNetwork(config(head_grouping=grouping), layers, 2048).generator.b_heads
            for grouping in ("shape", "kind")
        )
    assert set(by_shape) == {"2048x12288", "4096x2048", "2048x8192", "2048x512"}
    assert set(by_kind) == {layer.kind.replace(".", "-") for layer in layers}
    assert len(by_kind) == 6


def test_no_prompt_makes_a_factor_larger_than_its_heads_allow(network: AgenticHyperNetwork) -> None:
    """For each row, |head f| <= sigma_max(head) |f|, and |f| is the same for every prompt."""
    wild = torch.cat([torch.randn(2, 7, EMBEDDING_SIZE) * scale for scale in (1e-6, 1.0, 1e6)])
    weights = network(wild, ones(6, 7))
    generator = network.generator
    for layer in LAYERS:
        group = f"{layer.in_features}x{layer.out_features}"
        for heads, rows in ((generator.a_heads, weights[layer.name].a), (generator.b_heads, weights[layer.name].b.mT)):
            bound = float(torch.linalg.matrix_norm(heads[group].weight, 2)) * generator.feature_norm  # type: ignore[arg-type]
            assert float(rows.norm(dim=-1).max()) <= bound * (1 + 1e-5)


@pytest.mark.parametrize("width", [64, 256, 1024])
@pytest.mark.parametrize("head", ["per_rank", "flat"])
def test_the_first_step_of_adam_moves_the_output_by_a_sane_amount(width: int, head: str) -> None:
    """Check the standard deviation of the delta's output for unit-variance inputs after one step at a learning rate of 1e-4.

    Plain LoRA's is 0.0005 for a gradient of random signs. It must not depend on the width, so that the learning rate
    need not depend on it either.
    """
    torch.manual_seed(3)
    layers = [LayerInfo(f"layers.{i}.wide", 512, 384) for i in range(4)]
    shape = config(width=width, num_heads=16, encoder_blocks=1, rank=16, alpha=32, head=head)
    network = AgenticHyperNetwork(shape, layers, EMBEDDING_SIZE)
    prompts = torch.randn(4, 6, EMBEDDING_SIZE)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    signs = {layer.name: torch.randn(384, 16).sign() for layer in layers}
    sum((network(prompts, ones(4, 6))[name].b * sign).sum() for name, sign in signs.items()).backward()
    optimizer.step()
    with torch.no_grad():
        weights = network(prompts, ones(4, 6))
        inputs = torch.randn(200, 512)
        moved = [shape.scale * inputs @ pair.a[b].T @ pair.b[b].T for pair in weights.values() for b in range(4)]
    assert 0.0005 < float(torch.stack(moved).std()) < 0.02


def gradient_sizes(network: AgenticHyperNetwork, prompts: torch.Tensor) -> dict[str, float]:
    """Return the root mean square of each parameter's gradient for a random linear function of every layer's output."""
    generator = torch.Generator().manual_seed(5)
    network.zero_grad()
    weights = network(prompts, ones(*prompts.shape[:2]))
    loss = torch.zeros(())
    for layer in network.layers:
        pair = weights[layer.name]
        x = torch.randn(len(prompts), 32, layer.in_features, generator=generator)
        direction = torch.randn(len(prompts), 32, layer.out_features, generator=generator)
        loss = loss + (network.scale * x @ pair.a.transpose(1, 2) @ pair.b.transpose(1, 2) * direction).sum()
    loss.backward()
    return {
        n: float(p.grad.square().mean().sqrt()) if p.grad is not None else 0.0 for n, p in network.named_parameters()
    }


@pytest.mark.parametrize("changes", [{}, {"head": "flat"}, {"head_grouping": "kind"}])
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_gradients_reach_b_at_once_and_everything_after_one_step(preset: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(4)
    layers = [layer for layer in real_layers() if layer.name.split(".")[2] in ("2", "3")]
    network = AgenticHyperNetwork(HyperNetworkConfig.preset(preset, **changes), layers, EMBEDDING_SIZE)
    prompts = torch.randn(3, 20, EMBEDDING_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    sides = {side: f"generator.{side}_heads." for side in ("a", "b")}

    sizes = gradient_sizes(network, prompts)
    of_b = [size for name, size in sizes.items() if name.startswith(sides["b"])]
    assert min(of_b) > 0
    # No projection, narrow or wide, learns a hundred times faster than another.
    assert max(of_b) < 100 * min(of_b)
    assert not any(size for name, size in sizes.items() if not name.startswith(sides["b"]))
    optimizer.step()

    sizes = gradient_sizes(network, prompts)
    assert all(0 < size < math.inf for size in sizes.values())
    for side in sides.values():
        of_side = [size for name, size in sizes.items() if name.startswith(side)]
        assert max(of_side) < 100 * min(of_side)


def test_the_first_gradient_of_b_depends_on_the_prompt() -> None:
    """Otherwise the first steps would learn a static adapter, which conditioning would have to unlearn."""
    torch.manual_seed(4)
    network = AgenticHyperNetwork(config(width=256), LAYERS, EMBEDDING_SIZE)
    gradients = []
    for prompts in torch.randn(2, 1, 20, EMBEDDING_SIZE):
        gradient_sizes(network, prompts)
        gradients.append(torch.cat([p.grad.flatten() for p in network.b_parameters() if p.grad is not None]))
    assert float(torch.cosine_similarity(*gradients, dim=0)) < 0.9


def test_a_prompt_without_a_real_token_is_refused(network: AgenticHyperNetwork) -> None:
    mask = ones(2, 5)
    mask[1] = False
    with pytest.raises(InvalidRequest, match="a prompt has no real token"):
        network(torch.randn(2, 5, EMBEDDING_SIZE), mask)
    with pytest.raises(InvalidRequest, match=r"mask of shape \[2, 4\] does not match features of shape \[2, 5, 24\]"):
        network(torch.randn(2, 5, EMBEDDING_SIZE), ones(2, 4))
