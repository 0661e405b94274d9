"""Compute the loss by its definition, with every probability written out, and make rows to test it on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from mpmath import mp, mpf
from torch import Tensor

from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss.options import LossOptions

_DIGITS = 160


@dataclass(frozen=True, eq=False)
class Case:
    """A student's hidden states and head, and a teacher's rows for them."""

    hidden: Tensor
    head: Tensor
    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    target: Tensor

    def rows(self, temperature: float = 1.0) -> TeacherRows:
        """Return the teacher's rows as the loss takes them."""
        return TeacherRows(self.ids, self.logprobs, self.tail, self.target, temperature)


def make_case(
    n: int, k: int, vocab: int, *, size: int = 24, std: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Case:
    """Make a student whose logits have about this standard deviation, and a teacher that is independent of it.

    Hidden states and head are multiples of 1/64, so that float32 holds every logit exactly and a measured error is due to
    the loss, not to the order in which a product is summed.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, size, generator=generator).mul(std * size**-0.5 * 64).round().div(64).to(dtype)
    head = torch.randn(vocab, size, generator=generator).mul(64).round().div(64).to(dtype)
    teacher = torch.randn(n, vocab, generator=generator, dtype=torch.float64) * std
    # Half of the targets are among the kept ids.
    target = torch.where(torch.arange(n) % 2 == 0, teacher.argmax(-1), torch.randint(vocab, (n,), generator=generator))
    return Case(hidden, head, *top_rows(teacher, k), target)


def top_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the teacher's kept ids, log-probabilities and tail for float64 logits [N, V]."""
    logp = logits.log_softmax(-1)
    top, ids = logp.topk(k, dim=-1)
    return ids, top.float(), logp.scatter(1, ids, -torch.inf).logsumexp(-1).float()


def oracle(
    case: Case, vocab: int, options: LossOptions | None = None, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient in the hidden states, exact except for the last rounding to float64.

    Where both softmaxes are confident, a true gradient of 1e-30 is a difference of numbers near 1, which float64 loses
    completely. So a row is computed by its definition, but with 160 digits, and the slope of a divergence by a difference
    quotient.
    """
    options = options or LossOptions()
    logits = case.hidden.double() @ case.head[:vocab].double().T
    with mp.workdps(_DIGITS):
        rows = [_row(case, n, logits[n].tolist(), options, mpf(temperature)) for n in range(len(logits))]
        loss = float(mp.fsum(row_loss for row_loss, _ in rows))
        gradient = torch.tensor([[float(g) for g in row] for _, row in rows], dtype=torch.float64)
    return torch.tensor(loss, dtype=torch.float64), gradient @ case.head[:vocab].double()


def _row(case: Case, n: int, logits: list[float], options: LossOptions, t: mpf) -> tuple[mpf, list[mpf]]:
    """Return the loss of one row and its gradient in the logits."""
    q = _softmax([z / t for z in logits])
    bucket_of = {
        i: b
        for b, (i, logp) in enumerate(zip(case.ids[n].tolist(), case.logprobs[n].tolist(), strict=True))
        if logp > -math.inf
    }
    tail = len(bucket_of)
    p = [mp.exp(logp) for logp in [*case.logprobs[n].tolist()[:tail], case.tail[n].item()]]
    p = [x / mp.fsum(p) for x in p]
    mass = [q[i] for i in bucket_of] + [mp.fsum(x for i, x in enumerate(q) if i not in bucket_of)]
    num_buckets = tail if tail == len(q) else tail + 1
    divergence = mp.fsum(_term(p[b], mass[b], options) for b in range(num_buckets))
    slope = [_slope(p[b], mass[b], options) for b in range(num_buckets)]
    slope_of = [slope[bucket_of.get(i, tail)] for i in range(len(q))]
    mean = mp.fdot(q, slope_of)
    q_at_1, w, target = _softmax(logits), mpf(options.ce_weight), case.target[n].item()
    loss = (1 - w) * t**2 * divergence - w * mp.log(q_at_1[target])
    return loss, [(1 - w) * t * q[i] * (slope_of[i] - mean) + w * (q_at_1[i] - (i == target)) for i in range(len(q))]


def _softmax(logits: list[mpf]) -> list[mpf]:
    exponentials = [mp.exp(z) for z in logits]
    total = mp.fsum(exponentials)
    return [x / total for x in exponentials]


def _term(p: mpf, q: mpf, options: LossOptions) -> mpf:
    """Return one bucket's term of the divergence."""
    if options.divergence == "tvd":
        return abs(p - q) / 2
    if options.divergence == "forward_kl":
        return _entropy_term(p, q)
    if options.divergence == "reverse_kl":
        return _entropy_term(q, p)
    beta = mpf(options.jsd_beta)
    m = beta * p + (1 - beta) * q
    return beta * _entropy_term(p, m) + (1 - beta) * _entropy_term(q, m)


def _entropy_term(u: mpf, v: mpf) -> mpf:
    return u * mp.log(u / v) if u else mpf(0)


def _slope(p: mpf, q: mpf, options: LossOptions) -> mpf:
    """Return d term / d q to about 100 digits."""
    step = q * mpf(10) ** (-_DIGITS // 3)
    return (_term(p, q + step, options) - _term(p, q - step, options)) / (2 * step)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in the 2-norm."""
    return float((found.double() - expected).norm() / expected.norm())
