"""The mean adapter is the best one of its rank, compared with the dense mean of the deltas."""

from __future__ import annotations

import torch

from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent_trainer.comparison.mean_adapter import mean_adapter

RANK, INPUTS, OUTPUTS, NUM = 3, 9, 7, 5


def adapters(outputs: int = OUTPUTS) -> list[AdapterWeights]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "layer": LoRAPair(
                torch.randn(RANK, INPUTS, generator=generator), torch.randn(outputs, RANK, generator=generator)
            )
        }
        for _ in range(NUM)
    ]


def test_it_is_the_closest_adapter_of_its_rank_to_the_mean_delta() -> None:
    several = adapters()
    mean = sum(one["layer"].b.double() @ one["layer"].a.double() for one in several) / NUM
    u, sigma, vt = torch.linalg.svd(mean)
    best = u[:, :RANK] @ torch.diag(sigma[:RANK]) @ vt[:RANK]
    found = mean_adapter(several)["layer"]
    assert (found.a.shape, found.b.shape, found.a.dtype) == ((RANK, INPUTS), (OUTPUTS, RANK), torch.float32)
    torch.testing.assert_close(found.b.double() @ found.a.double(), best, rtol=0, atol=1e-6)


def test_the_mean_of_one_adapter_is_that_adapter() -> None:
    one = adapters()[0]
    found = mean_adapter([one])["layer"]
    torch.testing.assert_close(found.b @ found.a, one["layer"].b @ one["layer"].a, rtol=0, atol=1e-5)


def test_a_layer_narrower_than_the_rank_keeps_the_rank() -> None:
    several = adapters(outputs=2)
    mean = sum(one["layer"].b @ one["layer"].a for one in several) / NUM
    found = mean_adapter(several)["layer"]
    assert (found.a.shape, found.b.shape) == ((RANK, INPUTS), (2, RANK))
    torch.testing.assert_close(found.b @ found.a, mean, rtol=0, atol=1e-5)
