"""Compute the metrics of single supervised rows: divergence, agreement, and likelihood of the recorded token.

The training loss is a sum over rows; a report also needs single rows, to tell apart the ones that depend on the condition,
positions and classes of tokens. A test checks that the divergences add up to the training loss.

Legend of shape suffixes: N supervised rows, C rows of a chunk, D hidden size, V vocabulary, K kept ids.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss.divergences import divergence_terms
from hyperagent_trainer.loss.options import LossOptions

_CHUNK_BYTES = 256 * 2**20
_FORWARD_KL = LossOptions()


@dataclass(frozen=True, eq=False)
class RowMetrics:
    """Metrics of N supervised rows under one adapter."""

    kl_N: NDArray[np.float64]
    """KL(teacher || student) over the kept ids and the tail, in nats."""
    nll_N: NDArray[np.float64]
    """Negative log-likelihood of the recorded token, in nats."""
    agrees_N: NDArray[np.bool_]
    """Whether the student's most likely id is the teacher's."""
    exact_N: NDArray[np.bool_]
    """Whether the student's most likely id is the recorded token."""

    @staticmethod
    def mean(draws: list[RowMetrics]) -> RowMetrics:
        """Return the mean KL and likelihood over several draws of an arm; the other metrics are those of the first draw."""
        first = draws[0]
        kl_N = np.mean([draw.kl_N for draw in draws], axis=0)
        return RowMetrics(kl_N, np.mean([draw.nll_N for draw in draws], axis=0), first.agrees_N, first.exact_N)


@torch.no_grad()
def row_metrics(hidden_ND: Tensor, head_VD: Tensor, rows: TeacherRows, *, vocab_size: int) -> RowMetrics:
    """Compute every metric of N rows.

    Args:
        hidden_ND: the student's final hidden states at the rows.
        head_VD: the student's output matrix, whose first `vocab_size` rows belong to the tokenizer.
        rows: the teacher's rows at temperature 1, with their target ids.
    """
    head_VD = head_VD[:vocab_size]
    chunk = max(1, _CHUNK_BYTES // (4 * vocab_size))
    parts = [
        _chunk_metrics((hidden_ND[start : start + chunk] @ head_VD.T).float(), rows[slice(start, start + chunk)])
        for start in range(0, len(hidden_ND), chunk)
    ]
    joined = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(RowMetrics)}
    return RowMetrics(**joined)


def _chunk_metrics(logits_CV: Tensor, rows: TeacherRows) -> RowMetrics:
    """Compute a chunk's metrics; `logits_CV` is overwritten.

    Only the sums over K + 1 buckets are in float64: the logits have float32's error already.
    """
    assert rows.target_ids_N is not None
    best_C = logits_CV.argmax(1)
    target_C = logits_CV.gather(1, rows.target_ids_N[:, None])[:, 0].double()
    is_kept_CK = rows.logprobs_NK > -torch.inf
    kept_CK = logits_CV.gather(1, rows.ids_NK).double().masked_fill(~is_kept_CK, -torch.inf)
    # Padding repeats the row's first id, which is kept.
    others_C = logits_CV.scatter_(1, rows.ids_NK, -torch.inf).logsumexp(1).double()
    masses_CB = torch.cat([kept_CK, others_C[:, None]], dim=1)
    nll_C = masses_CB.logsumexp(1) - target_C
    logp_CB = torch.cat([rows.logprobs_NK, rows.tail_logmass_N[:, None]], dim=1).double()
    kl_C, _ = divergence_terms(logp_CB.log_softmax(1), masses_CB.log_softmax(1), _FORWARD_KL)
    teacher_C = rows.ids_NK.gather(1, rows.logprobs_NK.argmax(1, keepdim=True))[:, 0]
    return RowMetrics(
        kl_C.cpu().numpy(),
        nll_C.cpu().numpy(),
        (best_C == teacher_C).cpu().numpy(),
        (best_C == rows.target_ids_N).cpu().numpy(),
    )


def teacher_metrics(rows: TeacherRows) -> RowMetrics:
    """Return the teacher's own metrics: what a perfect student would reach.

    The likelihood of a token that the teacher did not keep is bounded by its tail.
    """
    assert rows.target_ids_N is not None
    is_target_NK = (rows.ids_NK == rows.target_ids_N[:, None]) & (rows.logprobs_NK > -torch.inf)
    kept_N = torch.where(is_target_NK, rows.logprobs_NK, -torch.inf).amax(1)
    logp_N = torch.where(is_target_NK.any(1), kept_N, rows.tail_logmass_N).double()
    teacher_N = rows.ids_NK.gather(1, rows.logprobs_NK.argmax(1, keepdim=True))[:, 0]
    return RowMetrics(
        np.zeros(rows.num_rows),
        -logp_N.cpu().numpy(),
        np.ones(rows.num_rows, bool),
        (teacher_N == rows.target_ids_N).cpu().numpy(),
    )
