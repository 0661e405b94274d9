"""Reduce logits to top-k rows.

Shapes: N rows, V real vocabulary entries, K kept ids, M temperatures other than 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperagent.errors import ServiceError
from hyperagent.topk import TopKRows


class TopKTensors(NamedTuple):
    """The kept part of N rows, on the device of the logits; not finite where the logits are not."""

    ids_NK: Tensor
    """int64, shape [N, K]: kept ids by descending log-probability, ties by id."""
    logprobs_NK: Tensor
    """float32, shape [N, K]: log-probabilities of the kept ids."""
    tail_N: Tensor
    """float32, shape [N]: log of the probability outside the kept ids; -inf if there is none."""
    target_N: Tensor
    """float32, log-probability of the token at the position."""
    tails_NM: Tensor
    """float32, shape [N, M]: see `hyperagent.topk.TopKRows.tail_logsumexps`."""


@torch.inference_mode()
def top_k_tensors(logits_NV: Tensor, targets_N: Tensor, *, top_k: int, temperatures: Sequence[float]) -> TopKTensors:
    """Reduce each row's distribution to its `top_k` most likely ids, computed in float32.

    Args:
        logits_NV: [N, V], any floating dtype, without the rows that only pad the vocabulary.
        targets_N: [N], int64, the actual tokens at the positions.
    """
    logprobs_NV = logits_NV.float().log_softmax(dim=1)
    values_NK, ids_NK, next_N = _largest(logprobs_NV, top_k)
    target_N = logprobs_NV.gather(1, targets_N[:, None]).squeeze(1)
    # 1 - sum(kept) loses all digits when the kept ids hold nearly all the probability, so the remaining terms are summed
    # directly. The sum works in place and relative to its largest term, which is known, to save passes over the vocabulary.
    shift_N = torch.where(next_N.isfinite(), next_N, 0.0)
    rest_NV = logprobs_NV.scatter_(1, ids_NK, -torch.inf).sub_(shift_N[:, None])
    tails_NM = torch.empty(len(rest_NV), len(temperatures), device=rest_NV.device)
    for column, temperature in enumerate(temperatures):
        tails_NM[:, column] = shift_N / temperature + (rest_NV / temperature).exp_().sum(dim=1).log()
    tail_N = shift_N + rest_NV.exp_().sum(dim=1).log()
    return TopKTensors(ids_NK, values_NK, tail_N, target_N, tails_NM)


def top_k_rows(
    logits_NV: Tensor,
    targets_N: Tensor,
    positions: NDArray[np.uint32],
    *,
    top_k: int,
    temperatures: Sequence[float],
) -> TopKRows:
    """`top_k_tensors` of the rows of `positions` [N], in host memory.

    Raises:
        ServiceError: a logit is not finite.
    """
    kept = top_k_tensors(logits_NV, targets_N, top_k=top_k, temperatures=temperatures)
    rows = TopKRows(
        positions=positions,
        ids=kept.ids_NK.cpu().numpy().astype(np.uint32),
        logprobs=kept.logprobs_NK.cpu().numpy(),
        tail_logmass=kept.tail_N.cpu().numpy(),
        target_logprob=kept.target_N.cpu().numpy(),
        tail_logsumexps=kept.tails_NM.cpu().numpy(),
    )
    require_finite(rows)
    return rows


def require_finite(rows: TopKRows) -> None:
    """Refuse rows whose logits were not finite: a NaN or +inf makes its whole row NaN, and a -inf stays -inf.

    Raises:
        ServiceError: a row is not finite; the message names the range of positions.
    """
    if not (np.isfinite(rows.logprobs).all() and np.isfinite(rows.target_logprob).all()):
        raise ServiceError(
            f"the model's logits are not finite within positions {rows.positions[0]} to {rows.positions[-1]}; "
            "check its weights, or serve it with --dtype float32"
        )


def _largest(logprobs_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return values and ids [N, k] by descending value, ties by id, and the largest value [N] that is not among them."""
    values, ids = logprobs_NV.topk(min(k + 1, logprobs_NV.shape[1]), dim=1)
    ids_NK, smallest_N = ids[:, :k], values[:, k - 1]
    next_N = values[:, k] if values.shape[1] > k else torch.full_like(smallest_N, -torch.inf)
    # Where more than k ids reach the smallest kept value, topk has kept an arbitrary choice of the tied ids.
    crowded_N = next_N == smallest_N
    if bool(crowded_N.any()):
        ids_NK[crowded_N] = _lowest_ids(logprobs_NV[crowded_N], smallest_N[crowded_N, None], k)
    ids_NK = ids_NK.sort(dim=1).values
    values_NK, by_value = logprobs_NV.gather(1, ids_NK).sort(dim=1, descending=True, stable=True)
    return values_NK, ids_NK.gather(1, by_value), next_N


def _lowest_ids(logprobs_CV: Tensor, smallest_C1: Tensor, k: int) -> Tensor:
    """Return the ids [C, k] of all values above each row's `smallest_C1`, filled up with the lowest ids that equal it."""
    above_CV, tied_CV = logprobs_CV > smallest_C1, logprobs_CV == smallest_C1
    room_C1 = k - above_CV.sum(dim=1, keepdim=True)
    kept_CV = above_CV | (tied_CV & (tied_CV.cumsum(dim=1, dtype=torch.int32) <= room_C1))
    return kept_CV.nonzero()[:, 1].view(-1, k)
