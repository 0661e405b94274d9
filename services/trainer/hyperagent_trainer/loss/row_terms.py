"""Turn logits at the kept ids and sums over all others into each row's loss and the gradient of its logits.

Legend of shape suffixes: N supervised rows, C rows of a chunk, K kept ids, J gathered ids (the kept ones and, with
cross-entropy, the target), B = K + 1 buckets.

Both backends, torch and Triton, reduce a row to the same numbers: its logits at the J gathered ids, and the maximum and
the sum of exponentials of all other logits (the *rest*). This module computes the loss from them for both. The rest is
never computed as 1 minus the others, which would lose all its digits when the student is confident.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss.divergences import divergence_terms
from hyperagent_trainer.loss.options import LossOptions


@dataclass(frozen=True)
class Objective:
    """Options, temperature and scale of the loss."""

    options: LossOptions
    temperature: float
    scale: float
    """Factor of the loss and its gradient, applied in float64 so that a bfloat16 gradient is rounded only once."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures of the softmaxes: the divergence's, then the cross-entropy's where it differs."""
        return (self.temperature,) if self.temperature == 1 or not self.options.ce_weight else (self.temperature, 1.0)


@dataclass(frozen=True, eq=False)
class GatheredIds:
    """The ids of each row whose logits get their own gradient; all other ids share one factor."""

    ids_CJ: Tensor
    """int64; a dead entry repeats the row's first id."""
    is_live_CJ: Tensor
    """bool: False at padding, and at the target's entry if the target is among the kept ids already."""
    is_target_CJ: Tensor | None
    """bool: True at the target; None without cross-entropy."""

    def __getitem__(self, rows: slice) -> GatheredIds:
        is_target_CJ = None if self.is_target_CJ is None else self.is_target_CJ[rows]
        return GatheredIds(self.ids_CJ[rows], self.is_live_CJ[rows], is_target_CJ)


@dataclass(frozen=True, eq=False)
class Rest:
    """Logits of the ids not gathered, at one temperature t; the sum of exp(z / t) is exp(max / t) * sum."""

    max_C: Tensor
    """Maximum of z, not of z / t; -inf if every id is gathered."""
    sum_C: Tensor
    temperature: float

    def __getitem__(self, rows: slice) -> Rest:
        return Rest(self.max_C[rows], self.sum_C[rows], self.temperature)


@dataclass(frozen=True, eq=False)
class RowTerms:
    """Losses and gradients of a chunk's rows; float64."""

    loss_C: Tensor
    """Loss of each row in nats, times the scale."""
    gathered_CJ: Tensor
    """d loss / d z at the gathered ids; 0 at dead entries."""
    rest_C: tuple[Tensor, ...]
    """For each temperature t, the factor f in d loss / d z = f * exp((z - max) / t) at every other id."""


def gather_ids(rows: TeacherRows) -> GatheredIds:
    """Return the kept ids and, with cross-entropy, the target.

    With its own entry, the target's gradient q - 1 is never rounded to bfloat16, and its loss does not suffer from
    cancellation.
    """
    ids_CK, is_live_CK = rows.ids_NK, rows.logprobs_NK > -torch.inf
    if rows.target_ids_N is None:
        return GatheredIds(ids_CK, is_live_CK, None)
    target_C1 = rows.target_ids_N[:, None]
    is_target_CK = is_live_CK & (ids_CK == target_C1)
    is_new_C1 = ~is_target_CK.any(1, keepdim=True)
    return GatheredIds(
        torch.cat([ids_CK, torch.where(is_new_C1, target_C1, ids_CK[:, :1])], dim=1),
        torch.cat([is_live_CK, is_new_C1], dim=1),
        torch.cat([is_target_CK, is_new_C1], dim=1),
    )


def row_terms(
    z_CJ: Tensor, gathered: GatheredIds, rests: tuple[Rest, ...], rows: TeacherRows, objective: Objective
) -> RowTerms:
    """Compute the losses of a chunk of rows and their gradients with respect to its logits.

    Args:
        z_CJ: the student's logits at the gathered ids.
        rests: one for each of the objective's temperatures.
    """
    z_CJ = torch.where(gathered.is_live_CJ, z_CJ.double(), -torch.inf)
    # Relative to the row's largest logit, so that a large common offset costs no digits.
    top_C = torch.maximum(z_CJ.amax(1), rests[0].max_C.double())
    z_CJ = z_CJ - top_C[:, None]
    log_rest_C = [(r.max_C.double() - top_C) / r.temperature + r.sum_C.double().log() for r in rests]

    loss_C, gathered_CJ, weight_C = _divergence(z_CJ / rests[0].temperature, log_rest_C[0], rows, objective)
    weights_C = [weight_C] + [torch.zeros_like(weight_C) for _ in rests[1:]]
    if gathered.is_target_CJ is not None:
        w = objective.options.ce_weight
        ce_C, ce_CJ, ce_weight_C = _cross_entropy(z_CJ, log_rest_C[-1], gathered.is_target_CJ)
        loss_C = (1 - w) * loss_C + w * ce_C
        gathered_CJ = (1 - w) * gathered_CJ + w * ce_CJ
        weights_C[0] = (1 - w) * weights_C[0]
        weights_C[-1] = weights_C[-1] + w * ce_weight_C
    rest_C = tuple(
        torch.where(r.sum_C == 0, 0.0, weight / r.sum_C.double()) for weight, r in zip(weights_C, rests, strict=True)
    )
    scale = objective.scale
    return RowTerms(scale * loss_C, scale * gathered_CJ, tuple(scale * factor_C for factor_C in rest_C))


def _divergence(
    z_CJ: Tensor, log_rest_C: Tensor, rows: TeacherRows, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, its gradient at the gathered ids and its gradient summed over the rest.

    The logits are already divided by the temperature.
    """
    k = rows.ids_NK.shape[1]
    # A target outside the kept ids belongs to the bucket "any other id".
    log_other_CX = torch.cat([z_CJ[:, k:], log_rest_C[:, None]], dim=1)
    log_mass_CB = torch.cat([z_CJ[:, :k], log_other_CX.logsumexp(1, keepdim=True)], dim=1)
    logp_CB = torch.cat([rows.logprobs_NK, rows.tail_logmass_N[:, None]], dim=1).double()
    # The checks have found the sum of the teacher's row close enough to 1; the remaining rounding is divided out.
    loss_C, grad_CB = divergence_terms(logp_CB.log_softmax(1), log_mass_CB.log_softmax(1), objective.options)
    share_CX = torch.where(log_other_CX > -torch.inf, (log_other_CX - log_mass_CB[:, k:]).exp(), 0.0)
    grad_CX = grad_CB[:, k:] * share_CX
    grad_CJ = torch.cat([grad_CB[:, :k], grad_CX[:, :-1]], dim=1)
    # The chain rule divides by the temperature, the loss is multiplied by its square.
    t = objective.temperature
    return loss_C * t**2, grad_CJ * t, grad_CX[:, -1] * t


def _cross_entropy(z_CJ: Tensor, log_rest_C: Tensor, is_target_CJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return -log q of the target, as log(1 + mass of the others / mass of the target), and its gradients.

    The gradients are those at the gathered ids and summed over the rest, as in `_divergence`.
    """
    z_target_C = torch.where(is_target_CJ, z_CJ, 0.0).sum(1)
    others_CJ = torch.where(is_target_CJ, -torch.inf, z_CJ)
    log_odds_C = torch.logaddexp(others_CJ.logsumexp(1), log_rest_C) - z_target_C
    loss_C = torch.logaddexp(torch.zeros_like(log_odds_C), log_odds_C)
    log_sum_C = z_target_C + loss_C
    grad_CJ = torch.where(is_target_CJ, -(log_odds_C - loss_C).exp()[:, None], (others_CJ - log_sum_C[:, None]).exp())
    return loss_C, grad_CJ, (log_rest_C - log_sum_C).exp()
