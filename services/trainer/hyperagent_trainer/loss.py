"""The distillation loss: forward KL from the teacher's top k and its tail to the student, one chunk of rows at a time.

Legend of shape suffixes: N supervised rows, K kept ids, D hidden size, V vocabulary.

The teacher's row is a distribution over K + 1 outcomes, its kept ids S and "any other id" R, and the student's
softmax q is put into the same buckets:

    KL = sum_S p_s (log p_s - log q_s) + p_R (log p_R - log q_R)

This is a lower bound of the KL over the whole vocabulary and is zero only if the student agrees on every bucket;
dropping the tail or renormalising the kept ids would instead reward the student for moving mass into R.

log q_R is a log-sum-exp over the logits outside S, not log(1 - sum q_S), which cancels to nothing when the
student is sure. The gradient with respect to the logits is q_s - p_s inside S and softmax_R * (q_R - p_R) outside;
it is taken to the hidden states in the forward pass, so that no [N, V] tensor outlives its chunk (the idea of
Liger-Kernel's fused losses, arXiv:2410.10989). The head is frozen and gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperagent.errors import InvalidRequest


def compute_distillation_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_logmass_N: Tensor,
    *,
    vocab_size: int,
    chunk_rows: int,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over rows of KL(teacher || student), in nats; a float32 scalar.

    At a temperature t it is that of the softmaxes at t, times t**2, which keeps gradients the size they are at 1
    (Hinton et al., arXiv:1503.02531, section 2).

    Divide by the number of supervised rows of the whole optimiser step to get nats per supervised token.

    Args:
        hidden_ND: the student's final hidden states at the supervised rows, in the head's dtype.
        head_VD: the student's frozen output head.
        ids_NK: int64, distinct within a row, but for padding at its end, which repeats its first id.
        logprobs_NK: float32, natural, at the temperature, normalised together with the tail; -inf at padding.
        tail_logmass_N: float32; -inf where nothing is left outside the kept ids.
        vocab_size: real entries; the head's rows from there on are padding and take no part.
        chunk_rows: rows whose logits exist at once.
        temperature: of both softmaxes, above 0.

    Raises:
        InvalidRequest: the head is not frozen, there are no rows, or shapes or ids do not fit.
    """
    if head_VD.requires_grad:
        raise InvalidRequest("the output head must be frozen: this loss computes no gradient for it")
    n, k = ids_NK.shape
    if n == 0:
        raise InvalidRequest("there are no supervised rows; an empty mask teaches nothing")
    if hidden_ND.shape[0] != n or logprobs_NK.shape != (n, k) or tail_logmass_N.shape != (n,):
        raise InvalidRequest(
            f"rows disagree in shape: hidden {tuple(hidden_ND.shape)}, ids {(n, k)}, "
            f"logprobs {tuple(logprobs_NK.shape)}, tail {tuple(tail_logmass_N.shape)}"
        )
    if vocab_size > head_VD.shape[0] or int(ids_NK.max()) >= vocab_size:
        raise InvalidRequest(
            f"the teacher's ids reach {int(ids_NK.max())}, the student's head has {head_VD.shape[0]} rows "
            f"of which {vocab_size} should be real; they belong to different tokenizers"
        )
    loss: Tensor = _ChunkedForwardKL.apply(
        hidden_ND, head_VD[:vocab_size], ids_NK, logprobs_NK, tail_logmass_N, chunk_rows, temperature
    )
    return loss


class _ChunkedForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        ids_NK: Tensor,
        logprobs_NK: Tensor,
        tail_logmass_N: Tensor,
        chunk_rows: int,
        temperature: float,
    ) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(hidden_ND) if wants_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits_CV = (hidden_ND[rows] @ head_VD.T).float().div_(temperature)
            total += _forward_kl_(logits_CV, ids_NK[rows], logprobs_NK[rows], tail_logmass_N[rows], wants_grad)
            if grad_ND is not None:
                grad_ND[rows] = logits_CV.to(head_VD.dtype) @ head_VD
        if grad_ND is not None:
            # The chain rule divides by the temperature, the loss is multiplied by its square.
            ctx.save_for_backward(grad_ND.mul_(temperature))
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad_total.to(grad_ND.dtype), None, None, None, None, None, None


def _forward_kl_(z_CV: Tensor, ids_CK: Tensor, logp_CK: Tensor, logp_R_C: Tensor, wants_grad: bool) -> Tensor:
    """Sum of KL over a chunk; turns the logits `z_CV` into their own gradient, in place."""
    is_padding_CK = logp_CK == -torch.inf
    z_S_CK = z_CV.gather(1, ids_CK).masked_fill_(is_padding_CK, -torch.inf)
    z_CV.scatter_(1, ids_CK, -torch.inf)
    # One pass over the vocabulary serves both the log-sum-exp and the gradient. With every id kept there is no
    # finite maximum, and exp(-inf - 0) is the zero that the softmax over nothing should be.
    max_C = z_CV.amax(dim=1)
    max_C = torch.where(max_C.isfinite(), max_C, 0.0)
    sum_C = z_CV.sub_(max_C[:, None]).exp_().sum(dim=1)
    lse_R_C = max_C + sum_C.log()
    lse_C = torch.logaddexp(torch.logsumexp(z_S_CK, dim=1), lse_R_C)
    p_CK, p_R_C = logp_CK.exp(), logp_R_C.exp()
    logq_CK = z_S_CK - lse_C[:, None]
    logq_R_C = lse_R_C - lse_C
    # 0 * -inf: an empty tail contributes nothing.
    tail_C = torch.where(p_R_C > 0, p_R_C * (logp_R_C - logq_R_C), 0.0)
    kl = torch.where(is_padding_CK, 0.0, p_CK * (logp_CK - logq_CK)).sum() + tail_C.sum()
    if wants_grad:
        z_CV.mul_(torch.where(sum_C > 0, (logq_R_C.exp() - p_R_C) / sum_C, 0.0)[:, None])
        grad_CK = logq_CK.exp() - p_CK
        # Padding repeats the first id, so it must write what that writes.
        z_CV.scatter_(1, ids_CK, torch.where(is_padding_CK, grad_CK[:, :1], grad_CK))
    return kl
