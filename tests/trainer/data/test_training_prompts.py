"""Prompts of training: own, or of another repository, drawn anew in every step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hyperagent.data.files.tokens_file import TRAIN, TokenizedTrajectory
from hyperagent.errors import DataError
from hyperagent_trainer.data.training_prompts import TrainingPrompts


def trajectory(number: int, repo: str) -> TokenizedTrajectory:
    ids = np.array([number, number + 1], np.uint32)
    places = np.array([1], np.uint32)
    return TokenizedTrajectory(
        f"t{number}", repo, TRAIN, ids, places, prompt_ids=np.array([number], np.uint32), student_ids=ids,
        student_positions=places,
    )  # fmt: skip


TRAJECTORIES = [trajectory(number, f"repo-{number // 2}") for number in range(8)]


def test_own_prompts_are_the_trajectories_own() -> None:
    prompts = TrainingPrompts(TRAJECTORIES, shuffled=False, seed=0)
    assert [int(p[0]) for p in prompts.of([3, 0, 7], step=5)] == [3, 0, 7]


def test_shuffled_prompts_are_of_every_other_repository_and_differ_between_steps() -> None:
    prompts = TrainingPrompts(TRAJECTORIES, shuffled=True, seed=0)
    drawn = Counter(int(prompts.of([4], step=step)[0][0]) for step in range(600))
    # Trajectories 4 and 5 are of one repository; each of the six others is expected 100 times, within five deviations.
    assert set(drawn) == {0, 1, 2, 3, 6, 7}
    assert all(abs(count - 100) < 5 * (600 * 1 / 6 * 5 / 6) ** 0.5 for count in drawn.values())


def test_the_draws_are_the_same_after_a_resume_and_differ_between_seeds() -> None:
    def draws(seed: int) -> list[int]:
        prompts = TrainingPrompts(TRAJECTORIES, shuffled=True, seed=seed)
        return [int(p[0]) for step in range(20) for p in prompts.of([0, 5], step=step)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_one_repository_cannot_be_shuffled() -> None:
    with pytest.raises(DataError, match="all training trajectories are of one repository"):
        TrainingPrompts(TRAJECTORIES[:2], shuffled=True, seed=0)
