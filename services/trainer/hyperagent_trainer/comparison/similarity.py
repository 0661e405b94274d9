"""Compare the adapters of held-out repositories with each other."""

from __future__ import annotations

from typing import Any

import torch

from hyperagent_trainer.comparison.inputs import Comparison
from hyperagent_trainer.evaluation.adapter_statistics import cosines
from hyperagent_trainer.network.adapted_student import AdaptedStudent

_NUM_REPOSITORIES = 24


@torch.no_grad()
def similarity(adapted: AdaptedStudent, comparison: Comparison, *, own_wins: float) -> dict[str, Any] | None:
    """Return the cosines between the deltas of up to 24 held-out repositories, as JSON values; None for fewer than two.

    Args:
        own_wins: share of trajectories whose own adapter is better than another repository's.
    """
    prompts = {t.repo: t.prompt_ids for t in comparison.data.trajectories}
    repositories = list(prompts)[:_NUM_REPOSITORIES]
    if len(repositories) < 2:
        return None
    parts = [adapted.adapters([prompts[repo]]) for repo in repositories]
    joined = {
        name: type(pair)(torch.cat([part[name].a for part in parts]), torch.cat([part[name].b for part in parts]))
        for name, pair in parts[0].items()
    }
    cosine_PP = cosines(joined)
    if cosine_PP is None:
        return None
    num = len(repositories)
    return {
        "repositories": repositories,
        "cosine": cosine_PP.tolist(),
        "mean_cosine": float((cosine_PP.sum() - num) / (num * (num - 1))),
        "own_beats_others": own_wins,
    }
