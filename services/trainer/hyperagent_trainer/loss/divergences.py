"""Compute divergences between two distributions over the same buckets, each with its gradient.

Legend of shape suffixes: C rows, B buckets.

p is the teacher, q the student, both as normalized log-probabilities; -inf is an empty bucket. Gradients are taken with
respect to the log of the student's unnormalized mass in each bucket (a logit, for a bucket of one id): with
a = d loss / d q, the gradient is q * (a - sum q a).

Every loss is a sum of terms that cannot be negative, not even by rounding, because a KL is computed as the Bregman
divergence sum(p log(p / q) - p + q), equal to it for normalized p and q. Near p = q, where p log(p / q) alone loses all
its digits to cancellation, the terms of the Bregman divergence are squares.

Everything is float64: it costs next to nothing on k + 1 buckets, and the only rounding left is that of the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hyperagent_trainer.loss.options import LossOptions

# Below this |x| the series of exp(x) - 1 - x is exact to 2e-11 and the difference itself to 2e-13.
_SERIES_BELOW = 1e-3


def divergence_terms(logp_CB: Tensor, logq_CB: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Return each row's loss in nats [C], at least 0, and its gradient [C, B]; both float64.

    A bucket that is empty on both sides contributes nothing.
    """
    if options.divergence == "jsd":
        return _jensen_shannon(logp_CB, logq_CB, options.jsd_beta)
    return _PLAIN[options.divergence](logp_CB, logq_CB)


def _forward_kl(logp_CB: Tensor, logq_CB: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) and its gradient; a = -p / q, so the gradient is q - p."""
    p_CB, q_CB = logp_CB.exp(), logq_CB.exp()
    return _bregman(p_CB, q_CB, logq_CB - logp_CB).sum(1), q_CB - p_CB


def _reverse_kl(logp_CB: Tensor, logq_CB: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(q || p) and its gradient; a = log(q / p) + 1."""
    p_CB, q_CB = logp_CB.exp(), logq_CB.exp()
    return _bregman(q_CB, p_CB, logp_CB - logq_CB).sum(1), _centered(q_CB, logq_CB - logp_CB)


def _jensen_shannon(logp_CB: Tensor, logq_CB: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, and its gradient.

    The definition is arXiv:2306.13649, eq. 1; a = (1 - beta) log(q / m).
    """
    p_CB, q_CB = logp_CB.exp(), logq_CB.exp()
    m_CB = beta * p_CB + (1 - beta) * q_CB
    log_m_over_p_CB = _log_mean_exp(logq_CB - logp_CB, 1 - beta)
    log_m_over_q_CB = _log_mean_exp(logp_CB - logq_CB, beta)
    loss_CB = beta * _bregman(p_CB, m_CB, log_m_over_p_CB) + (1 - beta) * _bregman(q_CB, m_CB, log_m_over_q_CB)
    return loss_CB.sum(1), _centered(q_CB, -(1 - beta) * log_m_over_q_CB)


def _total_variation(logp_CB: Tensor, logq_CB: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum |p - q| / 2 and its gradient; a = sign(q - p) / 2, and 0 where they are equal."""
    difference_CB = logq_CB.exp() - logp_CB.exp()
    return difference_CB.abs().sum(1) / 2, _centered(logq_CB.exp(), difference_CB.sign() / 2)


_PLAIN: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "tvd": _total_variation,
}


def _bregman(u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Return u log(u / v) - u + v = u (exp(x) - 1 - x) for x = log(v / u), at least 0; the result is v where u = 0."""
    near = x.abs() < 1
    small = torch.where(near, x, 0.0)
    series = small**2 * (0.5 + small / 6 + small**2 / 24)
    excess = torch.where(small.abs() < _SERIES_BELOW, series, torch.expm1(small) - small)
    # Far from 0 nothing cancels, but exp(x) may overflow where v does not.
    far = v - u - torch.where(u > 0, u * x, 0.0)
    return torch.where(near, u * excess, far)


def _log_mean_exp(x: Tensor, weight: float) -> Tensor:
    """Return log(1 - weight + weight * exp(x)), exact near x = 0 and without overflow."""
    below = torch.log1p(weight * torch.expm1(x.clamp(max=1)))
    above = x + torch.log1p((1 - weight) * torch.expm1(-x.clamp(min=0)))
    return torch.where(x < 1, below, above)


def _centered(q_CB: Tensor, a_CB: Tensor) -> Tensor:
    """Return q * (a - sum q a); the value of a in empty buckets of q is ignored.

    The value of a in the fullest bucket is subtracted first. For a confident student, q (a - sum q a) in that bucket
    would otherwise be the small difference of two large numbers.
    """
    a_CB = torch.where(q_CB > 0, a_CB, 0.0)
    a_CB = a_CB - a_CB.gather(1, q_CB.argmax(1, keepdim=True))
    return q_CB * (a_CB - (q_CB * a_CB).sum(1, keepdim=True))
