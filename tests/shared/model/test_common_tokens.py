"""Ids that nearly all prompts share are not read, in training and from a bundle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hyperagent.model.common_tokens import common_ids, readable
from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.hypernetwork import AgenticHyperNetwork

LAYERS = [LayerInfo("model.layers.0.self_attn.q_proj", 12, 8)]
CONFIG = HyperNetworkConfig(width=16, num_latents=3, encoder_blocks=2, generator_blocks=1, num_heads=2, rank=2, alpha=4)


def prompt(*ids: int) -> NDArray[np.uint32]:
    return np.array(ids, np.uint32)


def test_an_id_counts_once_per_prompt_and_a_share_at_the_bound_is_not_common() -> None:
    prompts = [prompt(1, 1, 1, 2), prompt(1, 3, 3), prompt(2, 3, 1), prompt(2, 5, 5, 5)]
    # Of four prompts 1 is in three, 2 in three, 3 in two, 5 in one.
    assert common_ids(prompts, num_ids=7, max_document_frequency=0.5).tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert common_ids(prompts, num_ids=7, max_document_frequency=0.75).tolist() == [0] * 7
    assert common_ids([prompt(4), prompt(4)], num_ids=5, max_document_frequency=1.0).tolist() == [0] * 5


def test_a_prompt_of_common_ids_alone_is_read_as_a_whole() -> None:
    ids_BP = torch.tensor([[1, 4, 1, 0], [1, 1, 0, 0]])
    mask_BP = torch.tensor([[True, True, True, False], [True, True, False, False]])
    common_V = torch.tensor([False, True, False, False, False])
    assert readable(ids_BP, mask_BP, common_V).tolist() == [[False, True, False, False], [True, True, False, False]]


def made(**changes: object) -> AgenticHyperNetwork:
    torch.manual_seed(0)
    common_V = torch.zeros(10, dtype=torch.bool)
    common_V[[1, 2, 3]] = True
    return AgenticHyperNetwork(CONFIG.model_copy(update=changes), LAYERS, 6, common_V=common_V).double()


def latents(network: AgenticHyperNetwork, ids: list[int]) -> torch.Tensor:
    ids_1P = torch.tensor([ids])
    features_1PE = torch.eye(10, 6, dtype=torch.float64)[ids_1P] + 0.1
    mask_1P = network.readable(ids_1P, torch.ones_like(ids_1P, dtype=torch.bool))
    with torch.no_grad():
        return network.encoder(features_1PE, mask_1P)


def test_common_ids_are_read_only_as_neighbors() -> None:
    # Without neighbors, another common id in the same place changes nothing; with them, it changes what the next id means.
    without = made(neighbors=0)
    assert torch.equal(latents(without, [1, 5, 6]), latents(without, [2, 5, 6]))
    bound = made(neighbors=1)
    assert not torch.allclose(latents(bound, [1, 5, 6]), latents(bound, [2, 5, 6]))
    # A common id behind the last distinctive one binds to nothing that is read.
    assert torch.equal(latents(bound, [1, 5, 6, 2]), latents(bound, [1, 5, 6, 3]))


@pytest.mark.parametrize("num_neighbors", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_binding_is_a_causal_sum(num_neighbors: int, num_tokens: int) -> None:
    encoder = made(neighbors=num_neighbors).encoder
    x_PD = torch.randn(num_tokens, 16, dtype=torch.float64)
    bind_ND = encoder.bind_ND.detach()
    by_hand = x_PD.clone()
    for p in range(num_tokens):
        for n in range(1, num_neighbors + 1):
            if p - n >= 0:
                by_hand[p] += bind_ND[n - 1] * x_PD[p - n]
    torch.testing.assert_close(encoder._bound(x_PD[None])[0].detach(), by_hand, rtol=0, atol=1e-14)


def test_without_common_ids_everything_real_is_read() -> None:
    network = AgenticHyperNetwork(CONFIG, LAYERS, 6)
    mask_BP = torch.tensor([[True, True, False]])
    assert torch.equal(network.readable(torch.tensor([[1, 2, 0]]), mask_BP), mask_BP)
