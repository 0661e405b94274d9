"""Test the plan's numbers for the hypernetwork against the real one: what autograd keeps, and the products torch counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from saved_tensors import saved_bytes
from tiny_student import real_config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.targets import discover_target_layers, num_adapter_parameters
from hyperagent_trainer.planning.network_cost import NetworkCost

SIZE = 2048


@pytest.fixture(scope="module")
def layers() -> list[LayerInfo]:
    """Target layers of the 80B student."""
    with torch.device("meta"):
        return discover_target_layers(AutoModelForCausalLM.from_config(real_config()))


def cost_and_network(preset: str, layers: Sequence[LayerInfo]) -> tuple[NetworkCost, AgenticHyperNetwork]:
    config = HyperNetworkConfig.preset(preset)
    cost = NetworkCost(config, len(layers), num_adapter_parameters(layers, config.rank), SIZE)
    return cost, AgenticHyperNetwork(config, layers, SIZE)


def prompt(num_tokens: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, num_tokens, SIZE), torch.ones(1, num_tokens, dtype=torch.bool)


class FusedNorm(torch.autograd.Function):
    """Keeps for its backward pass what PyTorch's GPU kernel does: input, weight and root mean square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        root = x.square().mean(-1, keepdim=True).rsqrt()
        ctx.save_for_backward(x, weight, root)
        return (x * root * weight).contiguous()


@pytest.mark.parametrize("num_tokens", [192, 1024])
@pytest.mark.parametrize("preset", ["tiny", "small", "flat"])
@pytest.mark.parametrize("fused_norms", [False, True])
def test_autograd_keeps_what_is_stated(
    preset: str, num_tokens: int, fused_norms: bool, layers: list[LayerInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    cost, network = cost_and_network(preset, layers)
    if fused_norms:
        monkeypatch.setattr(nn.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight))
    counted = saved_bytes(lambda: network(*prompt(num_tokens)), network)
    assert cost.kept_bytes(num_tokens, fused_norms=fused_norms) == pytest.approx(counted, rel=0.01)


def test_the_full_runs_network_keeps_three_and_a_half_gigabytes(layers: list[LayerInfo]) -> None:
    """By hand: for each of 32,768 prompt tokens 2 * 2,048 and 18 * 1,024 numbers, and 86 times 1,920 rows of 1,024."""
    cost = NetworkCost(HyperNetworkConfig(), len(layers), num_adapter_parameters(layers, 16), SIZE)
    by_hand = 4 * (32_768 * (2 * 2048 + 18 * 1024) + 86 * 1920 * 1024)
    assert by_hand == pytest.approx(3.63e9, rel=0.01)
    assert cost.kept_bytes(32_768, fused_norms=True) == pytest.approx(by_hand, rel=0.02)


@pytest.mark.parametrize("num_tokens", [64, 512])
@pytest.mark.parametrize("preset", ["tiny", "small", "flat"])
def test_its_products_are_those_that_torch_counts(preset: str, num_tokens: int, layers: list[LayerInfo]) -> None:
    cost, network = cost_and_network(preset, layers)
    # Attention as plain products; the backward pass has two for each one of the forward pass.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        adapters = network(*prompt(num_tokens))
        sum(pair.a.sum() + pair.b.sum() for pair in adapters.values()).backward()
    assert cost.training_flops(num_tokens) == counter.get_total_flops()
