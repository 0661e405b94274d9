"""Check that the hypernetwork's features depend on the prompt before it is trained.

Where they hardly do, training ends at one adapter for every prompt: what all prompts have in common is learned first, and
once it is learned no gradient is left that tells them apart. docs/experiments.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hyperagent.data.files.tokens_file import TokenizedTrajectory
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent_trainer.evaluation.prompt_share import prompt_share
from hyperagent_trainer.network.adapted_student import AdaptedStudent
from hyperagent_trainer.report import Check

MIN_SHARE = 0.01
"""Least share of the features' energy that should differ between prompts."""
_NUM_PROMPTS = 16


def check_prompts(adapted: AdaptedStudent, trajectories: Sequence[TokenizedTrajectory]) -> Check | None:
    """Measure the prompt's share of the features on training prompts of different repositories.

    Returns:
        The check, which warns and never fails; None for a static adapter, or with fewer than two repositories.
    """
    network = adapted.network
    prompts = list({trajectory.repo: trajectory.prompt_ids for trajectory in trajectories}.values())[:_NUM_PROMPTS]
    if not isinstance(network, AgenticHyperNetwork) or len(prompts) < 2:
        return None
    share = prompt_share(adapted, prompts)
    return Check(
        "prompt_share",
        True,
        {"share of feature energy": share, "tokens read": _share_read(network, prompts), "prompts": len(prompts)},
        f"share of feature energy >= {MIN_SHARE:g}",
        "prompts that share nearly all their tokens end in one adapter for every prompt; lower the hypernetwork's "
        "max_document_frequency, or choose a condition that differs between repositories",
        warns=share < MIN_SHARE,
    )


def _share_read(network: AgenticHyperNetwork, prompts: Sequence[NDArray[np.uint32]]) -> float:
    """Return the share of the prompts' tokens that the hypernetwork reads."""
    if not len(network.common_V):
        return 1.0
    is_common = network.common_V.cpu().numpy()
    ids = np.concatenate(prompts)
    return float(1 - is_common[ids].mean())
