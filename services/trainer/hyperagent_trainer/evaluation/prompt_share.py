"""Measure how much of a hypernetwork's features depends on the prompt.

The features that the heads read have a fixed norm, so their energy is shared between what is the same for every prompt and
what differs. Of n prompts with features f_1 ... f_n, the share that differs is

    1 - (mean of <f_i, f_j> over i != j) / (mean of <f_i, f_i>)

which is 0 if every prompt gives the same features, and 1 if those of different prompts are orthogonal.

Legend of shape suffixes: N prompts, M target layers, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent_trainer.network.adapted_student import AdaptedStudent


@torch.no_grad()
def prompt_share(adapted: AdaptedStudent, prompts: Sequence[NDArray[np.uint32]]) -> float:
    """Return the share of the features' energy that differs between `prompts`, at least two token id arrays [P]."""
    network = adapted.network
    assert isinstance(network, AgenticHyperNetwork)
    # One prompt at a time: a batch of long ones would need as much memory as a training step.
    features = [network.generator.features(network.encoder(*adapted.features([prompt])))[0] for prompt in prompts]
    flat_NF = torch.stack(features).flatten(1).double()
    products_NN = flat_NF @ flat_NF.T
    num = len(prompts)
    same = products_NN.diagonal().mean()
    different = (products_NN.sum() - products_NN.diagonal().sum()) / (num * (num - 1))
    return float(1 - different / same)
