"""How much the features depend on the prompt: measured, reported by the pre-flight, and raised by the mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hyperagent.data.files.tokens_file import TRAIN, TokenizedTrajectory
from hyperagent.model.common_tokens import common_ids
from hyperagent.model.config import HyperNetworkConfig
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.static_lora import StaticLoRA
from hyperagent.model.targets import discover_target_layers
from hyperagent_trainer.evaluation.prompt_share import prompt_share
from hyperagent_trainer.network.adapted_student import AdaptedStudent
from hyperagent_trainer.preflight.prompts import MIN_SHARE, check_prompts
from hyperagent_trainer.student.student import Student

CONFIG = HyperNetworkConfig(width=32, num_latents=4, encoder_blocks=2, generator_blocks=1, num_heads=2, rank=4, alpha=8)
NUM_SHARED, NUM_OWN = 180, 3


def prompts(num: int = 12) -> list[NDArray[np.uint32]]:
    """Many words that all prompts share, and a few at the end that they draw for themselves."""
    generator = np.random.default_rng(0)
    shared = generator.integers(0, 90, NUM_SHARED)
    return [np.concatenate([shared, generator.integers(100, 220, NUM_OWN)]).astype(np.uint32) for _ in range(num)]


def adapted_student(folder: Path, max_document_frequency: float) -> AdaptedStudent:
    student = Student(folder, device=torch.device("cpu"))
    torch.manual_seed(0)
    network = AgenticHyperNetwork(
        CONFIG,
        discover_target_layers(student.model),
        student.embeddings.shape[1],
        common_V=common_ids(prompts(), num_ids=len(student.embeddings), max_document_frequency=max_document_frequency),
    )
    return AdaptedStudent(student, network)


def trajectories(several: list[NDArray[np.uint32]]) -> list[TokenizedTrajectory]:
    ids, places = np.array([1, 2], np.uint32), np.array([1], np.uint32)
    return [
        TokenizedTrajectory(f"t{i}", f"repo-{i}", TRAIN, ids, places, prompt, ids, places)
        for i, prompt in enumerate(several)
    ]


def test_it_is_the_energy_that_is_left_when_the_mean_over_other_prompts_is_removed(student_folder: Path) -> None:
    adapted = adapted_student(student_folder, 0.9)
    network = adapted.network
    assert isinstance(network, AgenticHyperNetwork)
    with torch.no_grad():
        rows = [network.generator.features(network.encoder(*adapted.features([p]))).flatten() for p in prompts(4)]
    features = torch.stack(rows).double().numpy()
    products = [float(features[i] @ features[j]) for i in range(4) for j in range(4) if i != j]
    energy = np.mean([float(f @ f) for f in features])
    assert prompt_share(adapted, prompts(4)) == pytest.approx(1 - np.mean(products) / energy, rel=1e-6)
    assert prompt_share(adapted, [prompts()[0]] * 3) == pytest.approx(0, abs=1e-12)


def test_shared_words_drown_the_others_unless_they_are_not_read(student_folder: Path) -> None:
    plain, masked = adapted_student(student_folder, 1.0), adapted_student(student_folder, 0.9)
    data = trajectories(prompts())
    read_all, read_own = check_prompts(plain, data), check_prompts(masked, data)
    assert read_all is not None
    assert read_own is not None
    assert (read_all.passed, read_all.warns, read_own.warns) == (True, True, False)
    assert read_all.measured["share of feature energy"] < MIN_SHARE
    assert float(read_own.measured["share of feature energy"]) > 10 * float(
        read_all.measured["share of feature energy"]
    )
    assert read_all.measured["tokens read"] == 1
    # Ids below 100 are shared by all twelve prompts; a few of the others may be too, which is improbable.
    assert read_own.measured["tokens read"] == pytest.approx(NUM_OWN / (NUM_OWN + NUM_SHARED))


def test_a_static_adapter_and_a_single_repository_have_no_such_check(student_folder: Path) -> None:
    adapted = adapted_student(student_folder, 0.9)
    assert check_prompts(adapted, trajectories(prompts(1))) is None
    layers = discover_target_layers(adapted.student.model)
    static = AdaptedStudent(adapted.student, StaticLoRA(layers, rank=4, alpha=8))
    assert check_prompts(static, trajectories(prompts())) is None
