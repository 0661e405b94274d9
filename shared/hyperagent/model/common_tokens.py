"""Find the token ids that nearly all training prompts share, which say nothing about a single prompt.

Instructions and tool declarations make up most of an agent's prompt and are the same in all of them. Pooled with the few
tokens that differ, they drown them: 99.8% of the features' energy is then common to all prompts, and training ends at one
adapter for every prompt. The hypernetwork therefore does not read these ids (scikit-learn's `max_df` is the same idea for
bags of words), though they stay in place as neighbors of the others. docs/experiments.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def common_ids(prompts: Iterable[NDArray[np.uint32]], *, num_ids: int, max_document_frequency: float) -> Tensor:
    """Return which ids occur in more than a share of the prompts, bool, shape [num_ids].

    Args:
        prompts: token ids of the training prompts.
        num_ids: number of rows of the student's embedding table.
        max_document_frequency: share of the prompts that an id may occur in; with 1 no id is common.
    """
    counts, num = np.zeros(num_ids, np.int64), 0
    for prompt in prompts:
        counts[np.unique(prompt)] += 1
        num += 1
    return torch.from_numpy(counts > max_document_frequency * num)


def readable(ids_BP: Tensor, mask_BP: Tensor, common_V: Tensor) -> Tensor:
    """Return the positions [B, P] (bool) that the hypernetwork reads.

    These are the real tokens whose ids are not common. A prompt without any, such as an empty one, is read as a whole,
    because attention needs at least one token.

    Args:
        ids_BP: int64, token ids.
        mask_BP: bool, True at real tokens.
        common_V: bool, True for common ids.
    """
    distinctive_BP = mask_BP & ~common_V[ids_BP]
    return torch.where(distinctive_BP.any(1, keepdim=True), distinctive_BP, mask_BP)
