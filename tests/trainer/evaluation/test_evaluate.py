"""Test which prompt the shuffled arm of an evaluation takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hyperagent.data.files.tokens_file import HELD_OUT, TRAIN, TokenizedTrajectory, read_tokens
from hyperagent.errors import DataError
from hyperagent_trainer.evaluation.evaluate import foreign_prompts


def trajectory(number: int, repo: str, split: str) -> TokenizedTrajectory:
    """Make a trajectory whose prompt no other trajectory has."""
    ids = np.array([number, 1], np.uint32)
    positions = np.array([1], np.uint32)
    return TokenizedTrajectory(
        f"t{number}",
        repo,
        split,
        token_ids=ids,
        positions=positions,
        prompt_ids=ids[:1],
        student_ids=ids,
        student_positions=positions,
    )


def repos_of(prompts: list[NDArray[np.uint32]], known: list[TokenizedTrajectory]) -> list[str]:
    repos = {int(t.prompt_ids[0]): t.repo for t in known}
    return [repos[int(prompt[0])] for prompt in prompts]


def test_shuffled_prompts_are_never_of_the_same_repository(tokens_file: Path) -> None:
    held_out = tuple(read_tokens(tokens_file, split=HELD_OUT))
    train = tuple(read_tokens(tokens_file, split=TRAIN))
    for trajectory, prompt in zip(held_out, foreign_prompts(held_out, train, seed=0), strict=True):
        assert not np.array_equal(prompt, trajectory.prompt_ids)
    (alone,) = foreign_prompts(held_out[:1], train, seed=0)
    assert any(np.array_equal(alone, t.prompt_ids) for t in train)


@pytest.mark.parametrize("seed", range(5))
def test_of_two_trajectories_per_repository_each_gets_the_other_repository_s_prompt(seed: int) -> None:
    held_out = [trajectory(i, f"repo-{i // 2}", HELD_OUT) for i in range(4)]
    assert repos_of(foreign_prompts(held_out, [], seed=seed), held_out) == ["repo-1", "repo-1", "repo-0", "repo-0"]


@pytest.mark.parametrize("seed", range(5))
def test_a_training_prompt_in_its_place_is_of_another_repository_as_well(seed: int) -> None:
    held_out = [trajectory(0, "shared", HELD_OUT)]
    train = [*(trajectory(i, "shared", TRAIN) for i in range(1, 9)), trajectory(9, "other", TRAIN)]
    assert repos_of(foreign_prompts(held_out, train, seed=seed), train) == ["other"]


def test_without_one_in_training_another_split_s_prompt_is_taken() -> None:
    held_out, train = [trajectory(0, "shared", HELD_OUT)], [trajectory(1, "shared", TRAIN)]
    elsewhere = [trajectory(2, "other", HELD_OUT)]
    assert repos_of(foreign_prompts(held_out, train, elsewhere, seed=0), elsewhere) == ["other"]


def test_data_of_a_single_repository_is_refused() -> None:
    held_out, train = [trajectory(0, "only", HELD_OUT)], [trajectory(1, "only", TRAIN)]
    with pytest.raises(DataError, match="all trajectories are of the repository 'only'"):
        foreign_prompts(held_out, train, seed=0)
