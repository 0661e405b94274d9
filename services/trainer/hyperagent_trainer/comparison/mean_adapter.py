"""Average the adapters of many prompts into one adapter of the same rank.

The mean of P deltas B A has rank up to P R. Its best approximation of rank R, in the Frobenius norm, keeps the R largest
singular values (Eckart and Young, 1936). Averaging A and B separately would give another matrix, since B A is not linear in
both.

Legend of shape suffixes: P prompts, R rank, I and O input and output features, X = P R.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hyperagent.data.files.tokens_file import TokenizedTrajectory
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent_trainer.comparison.arms import spread
from hyperagent_trainer.network.adapted_student import AdaptedStudent

NUM_MEAN_PROMPTS = 64
"""Largest number of prompts to average over."""


@torch.no_grad()
def mean_of_prompts(
    adapted: AdaptedStudent, trajectories: Sequence[TokenizedTrajectory], *, seed: int
) -> AdapterWeights:
    """Return the mean adapter a [R, I], b [O, R] of some trajectories' prompts, of as many repositories as possible."""
    return mean_adapter(
        {name: LoRAPair(pair.a[0], pair.b[0]) for name, pair in adapted.adapters([prompt]).items()}
        for prompt in spread(trajectories, NUM_MEAN_PROMPTS, seed=seed)
    )


@torch.no_grad()
def mean_adapter(adapters: Iterable[AdapterWeights]) -> AdapterWeights:
    """Return the adapter a [R, I], b [O, R] of rank R that is closest to the mean delta.

    Args:
        adapters: at least one adapter a [R, I], b [O, R] per layer; all of the same rank.
    """
    collected: dict[str, list[LoRAPair]] = {}
    for adapter in adapters:
        for name, pair in adapter.items():
            collected.setdefault(name, []).append(pair)
    return {name: _mean_pair(pairs) for name, pairs in collected.items()}


def _mean_pair(pairs: list[LoRAPair]) -> LoRAPair:
    rank, dtype = pairs[0].a.shape[0], pairs[0].a.dtype
    b_OX = torch.cat([pair.b for pair in pairs], dim=1).double()
    a_XI = torch.cat([pair.a for pair in pairs], dim=0).double() / len(pairs)
    # The singular values of B A are those of the small product of the two triangular factors.
    q_OX, r_XX = torch.linalg.qr(b_OX)
    q_IX, s_XX = torch.linalg.qr(a_XI.T)
    u, sigma, vt = torch.linalg.svd(r_XX @ s_XX.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    b_OR: Tensor = q_OX @ (u[:, :rank] * root)
    a_RI: Tensor = (root[:, None] * vt[:rank]) @ q_IX.T
    missing = rank - len(root)
    if missing > 0:
        # The layer is narrower than the rank.
        b_OR = torch.nn.functional.pad(b_OR, (0, missing))
        a_RI = torch.nn.functional.pad(a_RI, (0, 0, 0, missing))
    return LoRAPair(a_RI.to(dtype), b_OR.to(dtype))
