"""Choose the prompts that a bundle's prompt statistics are computed from, and compute them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import structlog
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hyperagent.data.files.tokens_file import HELD_OUT, TRAIN, TokenizedTrajectory
from hyperagent.errors import DataError
from hyperagent.model.featurizer import PromptFeaturizer, make_featurizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.prompt_distance import PromptStatistics, prompt_statistics
from hyperagent_trainer.network.adapted_student import AdapterNetwork

log = structlog.get_logger()

MAX_PROMPTS = 512
"""Largest number of prompts of each split, because each costs a forward pass of the encoder."""

Prompt = NDArray[np.uint32]


def statistics_of_run(
    network: AdapterNetwork, student: PreTrainedModel, trajectories: Iterable[TokenizedTrajectory], *, seed: int
) -> PromptStatistics | None:
    """Compute the prompt statistics of a run's network, with the loaded student; a collective call if it is sharded.

    Args:
        trajectories, seed: see `statistics_of`.

    Returns:
        The statistics; None for a static adapter, and, with a warning in the log, if the prompts do not determine any.
    """
    if not isinstance(network, AgenticHyperNetwork):
        return None
    featurize = make_featurizer(network.config.featurizer, student)
    try:
        return statistics_of(network, featurize, trajectories, seed=seed)
    except DataError as error:
        log.warning("the bundle has no prompt statistics", reason=str(error))
        return None


def statistics_of(
    network: AgenticHyperNetwork,
    featurize: PromptFeaturizer,
    trajectories: Iterable[TokenizedTrajectory],
    *,
    seed: int,
) -> PromptStatistics:
    """Compute the prompt statistics of a network that was trained on the trajectories of the training split.

    Args:
        trajectories: all trajectories of a run, of every split, in any number of copies.
        seed: seed of the choice of prompts.

    Raises:
        DataError: the trajectories cannot be read, or their prompts do not determine the statistics.
    """
    prompts: dict[str, dict[str, dict[bytes, Prompt]]] = {TRAIN: {}, HELD_OUT: {}}
    for trajectory in trajectories:
        if trajectory.split in prompts:
            distinct = prompts[trajectory.split].setdefault(trajectory.repo, {})
            distinct[trajectory.prompt_ids.tobytes()] = trajectory.prompt_ids
    training, held_out = (
        spread({repo: list(distinct.values()) for repo, distinct in prompts[split].items()}, seed=seed)
        for split in (TRAIN, HELD_OUT)
    )
    return prompt_statistics(network, featurize, training, held_out)


def spread(prompts: dict[str, list[Prompt]], *, seed: int) -> list[Prompt]:
    """Choose at most `MAX_PROMPTS` prompts: one of each repository in turn, repositories and prompts in random order.

    Args:
        prompts: the prompts of each repository.
        seed: seed of the order.
    """
    generator = np.random.default_rng(seed)
    repos = [prompts[repo] for repo in sorted(prompts)]
    orders = [generator.permutation(len(own)) for own in repos]
    turns = [(turn, repo) for repo, order in enumerate(orders) for turn in range(len(order))]
    rank = generator.permutation(len(repos))
    turns.sort(key=lambda chosen: (chosen[0], rank[chosen[1]]))
    return [repos[repo][orders[repo][turn]] for turn, repo in turns[:MAX_PROMPTS]]
