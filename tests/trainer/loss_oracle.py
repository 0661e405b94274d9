"""The loss by its definition, in float64 with every probability written out, and rows to try it on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperagent_trainer.loss import LossOptions


@dataclass(frozen=True, eq=False)
class Case:
    """A student and a teacher's rows for it."""

    hidden: Tensor
    head: Tensor
    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    target: Tensor


def make_case(
    n: int, k: int, vocab: int, *, size: int = 24, std: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Case:
    """A student whose logits have about this standard deviation, and a teacher that knows nothing of it.

    Hidden states and head are multiples of 1/64, so that float32 holds every logit exactly, and an error that is
    measured is the loss's own and not that of one more way to sum a product.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, size, generator=generator).mul(std * size**-0.5 * 64).round().div(64).to(dtype)
    head = torch.randn(vocab, size, generator=generator).mul(64).round().div(64).to(dtype)
    teacher = torch.randn(n, vocab, generator=generator, dtype=torch.float64) * std
    # Half of the targets are among the kept ids.
    target = torch.where(torch.arange(n) % 2 == 0, teacher.argmax(-1), torch.randint(vocab, (n,), generator=generator))
    return Case(hidden, head, *top_rows(teacher, k), target)


def top_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A teacher's kept ids, log-probabilities and tail of float64 logits [N, V]."""
    logp = logits.log_softmax(-1)
    top, ids = logp.topk(k, dim=-1)
    return ids, top.float(), logp.scatter(1, ids, -torch.inf).logsumexp(-1).float()


def oracle(
    case: Case, vocab: int, options: LossOptions | None = None, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the hidden states, by autograd."""
    options = options or LossOptions()
    hidden = case.hidden.detach().double().requires_grad_()
    logits = hidden @ case.head[:vocab].double().T
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(hidden)):
        is_kept = torch.zeros(vocab, dtype=torch.bool)
        ids = case.ids[n][case.logprobs[n] > -torch.inf]
        is_kept[ids] = True
        logp = torch.cat([case.logprobs[n][: len(ids)], case.tail[n : n + 1]]).double()
        logq_all = (logits[n] / temperature).log_softmax(0)
        logq = torch.cat([logq_all[ids], logq_all[~is_kept].logsumexp(0, keepdim=True)])
        if len(ids) == vocab:
            logp, logq = logp[:-1], logq[:-1]
        kd = _divergence(logp - logp.logsumexp(0), logq, options) * temperature**2
        ce = -logits[n].log_softmax(0)[case.target[n]]
        total = total + (1 - options.ce_weight) * kd + options.ce_weight * ce
    (gradient,) = torch.autograd.grad(total, hidden)
    return total.detach(), gradient


def _divergence(logp: Tensor, logq: Tensor, options: LossOptions) -> Tensor:
    p, q = logp.exp(), logq.exp()
    if options.divergence == "forward_kl":
        return (p * (logp - logq)).sum()
    if options.divergence == "reverse_kl":
        return (q * (logq - logp)).sum()
    if options.divergence == "tvd":
        return (p - q).abs().sum() / 2
    beta = torch.tensor(options.jsd_beta, dtype=torch.float64)
    logm = torch.logaddexp(beta.log() + logp, (1 - beta).log() + logq)
    return beta * (p * (logp - logm)).sum() + (1 - beta) * (q * (logq - logm)).sum()


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((found.double() - expected).norm() / expected.norm())
