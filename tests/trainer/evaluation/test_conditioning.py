"""Test the verdict on conditioning in worlds where the answer is known, with trained arms.

`python benchmarks/conditioning.py` prints the results of several seeds and learning rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from arms import CONSTANT_SETTINGS, PROMPT_SETTINGS, run_world
from worlds import FIRST_NAME, KEPT_PROBABILITIES, NUM_IDS, VOCAB_SIZE, World, train_student

from hyperagent_trainer.evaluation.arms import FROZEN, OWN, SHUFFLED, STATIC, TRAINED_ON_SHUFFLED
from hyperagent_trainer.evaluation.verdict import PAYS, STATIC_SUFFICES
from hyperagent_trainer.student.student import Student


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """Student that answers with the mean over all latents; both worlds share it because its training is the same."""
    return Student(train_student(tmp_path_factory.mktemp("world"), World.make("prompt")), device=torch.device("cpu"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(900)  # Four trainings, one after another on one core.
def test_where_the_prompt_decides_the_hypernetwork_closes_the_gap_and_a_static_lora_cannot(
    student: Student, one_thread: None
) -> None:
    world = World.make("prompt")
    report = run_world(world, student, PROMPT_SETTINGS, seed=0).report
    gap_closed = {arm: closed or 0.0 for arm, closed in report.gap_closed.items()}
    # The student has learned everything that does not need the prompt: the remaining KL is the worth of the latent.
    assert report.kl[FROZEN] == pytest.approx(world.information, rel=0.05)
    assert gap_closed[OWN] >= 0.9
    assert gap_closed[SHUFFLED] < 0.1
    assert abs(gap_closed[STATIC]) < 0.05
    # Prompts that say nothing in training are not read afterwards either.
    assert gap_closed[TRAINED_ON_SHUFFLED] < 0.1
    assert report.verdict == PAYS, report.reason


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_where_the_prompt_is_irrelevant_a_static_lora_suffices(student: Student, one_thread: None) -> None:
    report = run_world(World.make("constant"), student, CONSTANT_SETTINGS, seed=0).report
    gap_closed = {arm: closed or 0.0 for arm, closed in report.gap_closed.items()}
    assert min(gap_closed[arm] for arm in (OWN, STATIC, TRAINED_ON_SHUFFLED)) >= 0.9
    assert gap_closed[SHUFFLED] == pytest.approx(gap_closed[OWN], abs=0.02)
    assert report.verdict == STATIC_SUFFICES, report.reason


def test_a_world_shows_the_student_nothing_of_its_latent() -> None:
    world, generator = World.make("prompt"), np.random.default_rng(0)
    assert not set(world.train) & set(world.held_out)
    assert all({latent[a] for latent in world.train} == set(range(4)) for a in range(3))
    latent = world.held_out[0]
    names = {FIRST_NAME + a * world.num_values + v for a, v in enumerate(latent)}
    prompt = set(world.prompt(latent, generator).tolist())
    assert {i for i in prompt if i < NUM_IDS - 96} == names
    # The same tokens under another latent: the context is the same, but the answers differ.
    one, other = (world.batch([x], np.random.default_rng(5)) for x in world.held_out[:2])
    assert torch.equal(one.token_ids_BT, other.token_ids_BT)
    assert not torch.equal(one.rows.ids_NK, other.rows.ids_NK)


def test_a_world_s_rows_are_distributions_and_their_mean_is_what_the_student_learns() -> None:
    world = World.make("prompt")
    rows = world.batch(world.train, np.random.default_rng(0)).rows
    assert (
        float((rows.logprobs_NK.double().exp().sum(1) + rows.tail_logmass_N.double().exp()).sub(1).abs().max()) < 1e-6
    )
    assert all(len(set(row)) == len(KEPT_PROBABILITIES) for row in rows.ids_NK.tolist())
    mean = world.mean_rows()
    assert mean.shape == (48, VOCAB_SIZE)
    torch.testing.assert_close(mean.sum(1), torch.ones(48))


def test_the_students_folder_is_one_the_trainer_takes(tmp_path: Path) -> None:
    student = Student(train_student(tmp_path, World.make("prompt"), num_steps=1), device=torch.device("cpu"))
    assert student.vocab_size == VOCAB_SIZE
    assert not any(p.requires_grad for p in student.model.parameters())
