"""Choose the prompt from which each training trajectory's adapter is generated: its own, or another repository's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hyperagent.data.files.tokens_file import TokenizedTrajectory
from hyperagent.errors import DataError


class TrainingPrompts:
    """Prompts of the training trajectories.

    A hypernetwork that is trained on shuffled prompts learns everything that does not depend on the prompt, with the same
    network, data and steps. It is therefore the control for the claim that own prompts pay.
    """

    def __init__(self, trajectories: Sequence[TokenizedTrajectory], *, shuffled: bool, seed: int) -> None:
        """Take the prompts of `trajectories`.

        Args:
            shuffled: draw a prompt of another repository instead, anew in every step, so that no wrong pair can be learned.
            seed: seed of the draws.

        Raises:
            DataError: the prompts shall be shuffled, but all trajectories are of one repository.
        """
        self._trajectories = trajectories
        self._shuffled = shuffled
        self._seed = seed
        if shuffled and len({trajectory.repo for trajectory in trajectories}) < 2:
            raise DataError(
                "all training trajectories are of one repository, so their prompts cannot be exchanged with another "
                "repository's; add a second repository, or set prompts: own in the recipe"
            )

    def of(self, indices: Sequence[int], *, step: int) -> list[NDArray[np.uint32]]:
        """Return the prompts [P] of the trajectories at `indices` in a step; a pure function of its arguments and the seed."""
        return [self._trajectories[self._foreign(i, step) if self._shuffled else i].prompt_ids for i in indices]

    def _foreign(self, index: int, step: int) -> int:
        generator = np.random.default_rng([self._seed, step, index])
        while True:
            drawn = int(generator.integers(len(self._trajectories)))
            if self._trajectories[drawn].repo != self._trajectories[index].repo:
                return drawn
