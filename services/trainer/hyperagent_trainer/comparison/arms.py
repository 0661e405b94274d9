"""The adapters of each arm for each held-out trajectory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import TokenizedTrajectory
from hyperagent.data.pipeline.views import Condition, condition_ids
from hyperagent.errors import DataError

Prompt = NDArray[np.uint32]


def foreign_prompts(trajectories: Sequence[TokenizedTrajectory], *, num_draws: int, seed: int) -> list[list[Prompt]]:
    """Draw prompts of other repositories for every trajectory; `num_draws` lists with one prompt per trajectory.

    Raises:
        DataError: all trajectories are of one repository.
    """
    generator = np.random.default_rng(seed)
    repos = np.array([trajectory.repo for trajectory in trajectories])
    if len(set(repos)) < 2:
        raise DataError(
            f"all held-out trajectories are of the repository {repos[0]!r}, so a shuffled prompt cannot be of another; "
            "hold out more repositories"
        )
    draws: list[list[Prompt]] = [[] for _ in range(num_draws)]
    for trajectory in trajectories:
        candidates = np.flatnonzero(repos != trajectory.repo)
        # Distinct prompts where there are enough.
        chosen = generator.choice(candidates, size=num_draws, replace=len(candidates) < num_draws)
        for draw, index in zip(draws, chosen, strict=True):
            draw.append(trajectories[int(index)].prompt_ids)
    return draws


def same_repository_prompts(trajectories: Sequence[TokenizedTrajectory]) -> list[Prompt] | None:
    """Return another prompt of the same repository for every trajectory; None if any has no other one."""
    found = []
    for trajectory in trajectories:
        others = (
            other.prompt_ids
            for other in trajectories
            if other.repo == trajectory.repo and not np.array_equal(other.prompt_ids, trajectory.prompt_ids)
        )
        prompt = next(others, None)
        if prompt is None:
            return None
        found.append(prompt)
    return found


def empty_prompt(tokenizer: ChatTokenizer, parts: Sequence[str]) -> Prompt:
    """Return the condition without any text: an empty task, without system prompt, tools and extra text."""
    return condition_ids(tokenizer, Condition(task=""), parts=[part for part in parts if part != "extra"])


def spread(trajectories: Sequence[TokenizedTrajectory], num: int, *, seed: int) -> list[Prompt]:
    """Return prompts of up to `num` trajectories, of as many repositories as possible."""
    order = np.random.default_rng(seed).permutation(len(trajectories))
    seen: set[str] = set()
    first: list[Prompt] = []
    rest: list[Prompt] = []
    for index in order:
        trajectory = trajectories[int(index)]
        (rest if trajectory.repo in seen else first).append(trajectory.prompt_ids)
        seen.add(trajectory.repo)
    return [*first, *rest][:num]
