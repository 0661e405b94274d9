"""Test that a batch of prompts of unequal length gets the adapters that each prompt gets alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hyperagent.model.adapter import AdapterWeights
from hyperagent.model.config import HyperNetworkConfig
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.targets import discover_target_layers
from hyperagent_trainer.network.adapted_student import AdaptedStudent
from hyperagent_trainer.student.student import Student

PROMPTS = [np.arange(first, first + length, dtype=np.uint32) for first, length in ((5, 1), (40, 2), (80, 9), (120, 8))]
"""One token short of the longest is where a mask that is off by one goes wrong alone."""


def adapted_student(folder: Path, featurizer: str) -> AdaptedStudent:
    """With heads for B that are not zero, as after training."""
    student = Student(folder, device=torch.device("cpu"))
    config = HyperNetworkConfig(
        width=32,
        num_latents=4,
        encoder_blocks=1,
        generator_blocks=1,
        num_heads=2,
        rank=4,
        alpha=8,
        featurizer=featurizer,
    )
    torch.manual_seed(0)
    network = AgenticHyperNetwork(config, discover_target_layers(student.model), student.embeddings.shape[1])
    for head in network.b_parameters():
        torch.nn.init.normal_(head, std=0.1)
    return AdaptedStudent(student, network.requires_grad_(False))


def largest_difference(one: AdapterWeights, place: int, other: AdapterWeights) -> float:
    """Return the largest error of any entry, relative to the largest value of its factor."""
    return max(
        float((one_factor[place] - other_factor[0]).abs().max() / other_factor[0].abs().max())
        for name in other
        for one_factor, other_factor in ((one[name].a, other[name].a), (one[name].b, other[name].b))
    )


@pytest.mark.parametrize("featurizer", ["embeddings", "hidden@2"])
def test_a_prompt_s_adapter_does_not_depend_on_the_other_prompts(student_folder: Path, featurizer: str) -> None:
    adapted = adapted_student(student_folder, featurizer)
    together = adapted.adapters(PROMPTS)
    alone = [adapted.adapters([prompt]) for prompt in PROMPTS]
    noise = max(largest_difference(together, place, one) for place, one in enumerate(alone))
    assert noise < 1e-5

    # One token more or less in any prompt gives a hundred times that error.
    for prompt, one in zip(PROMPTS, alone, strict=True):
        longer = adapted.adapters([np.append(prompt, np.uint32(0))])
        assert largest_difference(longer, 0, one) > max(100 * noise, 1e-3)
    for prompt, one in zip(PROMPTS[1:], alone[1:], strict=True):
        assert largest_difference(adapted.adapters([prompt[:-1]]), 0, one) > max(100 * noise, 1e-3)
