"""Compute the loss over blocks of rows and slabs of the vocabulary in plain PyTorch, on a CPU or any GPU.

Legend of shape suffixes: N supervised rows, M rows of a block, X ids of a slab, P picked entries of a slab, J gathered
ids, D hidden size, V vocabulary.

The part of the gradient that comes from the ids not gathered, the sum of softmax(z) over them times their rows of the
head, is attention with the hidden state as query and the head as keys and values. It is computed as FlashAttention does
(arXiv:2205.14135): slab by slab, with a running maximum and a running sum. A block can therefore have thousands of rows,
which matrix products need to be fast, while its logits take a few dozen MiB; with whole rows of logits (the chunks of
Liger-Kernel, arXiv:2410.10989) only 160 rows would fit into that. The gradient goes directly to the hidden states,
nothing of size V outlives its slab, and the frozen head costs no third product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss import matmul
from hyperagent_trainer.loss.row_terms import GatheredIds, Objective, Rest, gather_ids, row_terms

_SLAB_IDS = 4096
# Bytes per gathered id: float64 arrays that are alive at once while a row's terms are computed.
_TERM_BYTES = 24 * 8
# Bytes per gathered id: the ids in the order of their slabs, and the arrays computed from them.
_PICK_BYTES = 8 * 8


def loss_and_gradient(
    hidden_ND: Tensor, head_VD: Tensor, rows: TeacherRows, objective: Objective, *, workspace: int, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of the rows' losses (float64) and, if `wants_grad`, its gradient in the hidden states' dtype.

    Args:
        head_VD: the output head without its padding rows.
        workspace: bytes for a block's logits and sums; at least one row is computed at a time.
    """
    n = hidden_ND.shape[0]
    tiling = _tiling(head_VD, rows, objective, workspace)
    grad_ND = torch.empty_like(hidden_ND) if wants_grad else None
    total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
    for start in range(0, n, tiling.rows):
        block = slice(start, start + tiling.rows)
        grad_MD = None if grad_ND is None else grad_ND[block]
        total += _block(hidden_ND[block], head_VD, rows[block], objective, grad_MD, tiling)
    return total, grad_ND


@dataclass(frozen=True)
class _Tiling:
    """Sizes of the pieces into which the work is split."""

    rows: int
    """Rows of a block."""
    slab_ids: int
    """Ids of a slab."""
    room: int
    """Bytes for the computations after a block's last slab."""


def _tiling(head_VD: Tensor, rows: TeacherRows, objective: Objective, workspace: int) -> _Tiling:
    """Return slabs of at most a quarter of the workspace, and as many rows as fit into the remainder."""
    (vocab, size), num_ids = head_VD.shape, rows.ids_NK.shape[1] + 1
    is_widened = matmul.operand_dtype(head_VD) != head_VD.dtype
    slab_ids = min(_SLAB_IDS, vocab)
    if is_widened:
        slab_ids = min(slab_ids, max(1, workspace // 4 // (4 * size)))
    per_row = max(4, head_VD.element_size()) * (slab_ids + size) * len(objective.temperatures) + _PICK_BYTES * num_ids
    if head_VD.dtype == torch.bfloat16:
        # The widened hidden states on a CPU, the rounded weights on a GPU.
        per_row += 4 * size if is_widened else 2 * slab_ids
    room = workspace // 8
    fixed = max(room, 4 * slab_ids * size if is_widened else 0)
    return _Tiling(max(1, (workspace - fixed) // per_row), slab_ids, room)


def _block(
    hidden_MD: Tensor,
    head_VD: Tensor,
    rows: TeacherRows,
    objective: Objective,
    grad_MD: Tensor | None,
    tiling: _Tiling,
) -> Tensor:
    """Return the summed loss of a block's rows and write their gradient into `grad_MD`."""
    gathered = gather_ids(rows)
    z_MJ, rests = _pass_over_vocabulary(
        hidden_MD, head_VD, gathered, objective.temperatures, tiling.slab_ids, wants_sums=grad_MD is not None
    )
    total = torch.zeros((), dtype=torch.float64, device=hidden_MD.device)
    term_rows = max(1, tiling.room // (_TERM_BYTES * z_MJ.shape[1]))
    for start in range(0, len(z_MJ), term_rows):
        part = slice(start, start + term_rows)
        terms = row_terms(z_MJ[part], gathered[part], tuple(r.rest[part] for r in rests), rows[part], objective)
        total += terms.loss_C.sum()
        # From here on this buffer holds the gradient of the logits.
        z_MJ[part] = terms.gathered_CJ
        for factor_C, running in zip(terms.rest_C, rests, strict=True):
            running.sums_MD[part] *= factor_C.to(z_MJ.dtype)[:, None]
    if grad_MD is not None:
        sums_MD = rests[0].sums_MD
        for running in rests[1:]:
            sums_MD += running.sums_MD
        matmul.add_gathered_(sums_MD, z_MJ, gathered.ids_CJ, head_VD, room=tiling.room)
        grad_MD.copy_(sums_MD)
    return total


@dataclass(frozen=True, eq=False)
class _RunningRest:
    """Running sums over the ids not gathered in the slabs seen so far, at one temperature t."""

    rest: Rest
    sums_MD: Tensor
    """Sums of exp((z - max) / t) * head; without columns where no gradient is wanted."""

    def add_(self, exp_MX: Tensor, slab_XD: Tensor, shrink_M: Tensor) -> None:
        """Add a slab's exponentials; `shrink_M` rescales the earlier sums to the new maximum."""
        self.rest.sum_C.mul_(shrink_M).add_(exp_MX.sum(1))
        if self.sums_MD.shape[1]:
            matmul.add_product_(self.sums_MD.mul_(shrink_M[:, None]), exp_MX, slab_XD)


def _pass_over_vocabulary(
    hidden_MD: Tensor,
    head_VD: Tensor,
    gathered: GatheredIds,
    temperatures: tuple[float, ...],
    slab_ids: int,
    *,
    wants_sums: bool,
) -> tuple[Tensor, list[_RunningRest]]:
    """Return the logits [M, J] at the gathered ids, and the sums over all other ids at each temperature."""
    m = hidden_MD.shape[0]
    hidden_MD = hidden_MD.to(matmul.operand_dtype(head_VD))
    max_M = hidden_MD.new_full((m,), -torch.inf, dtype=torch.promote_types(head_VD.dtype, torch.float32))
    rests = [
        _RunningRest(Rest(max_M, torch.zeros_like(max_M), t), max_M.new_zeros(m, head_VD.shape[1] if wants_sums else 0))
        for t in temperatures
    ]
    buffers = [max_M.new_empty(m * slab_ids) for _ in temperatures]
    picks = _Picks.of(gathered, head_VD.shape[0], slab_ids)
    z_MJ = max_M.new_empty(gathered.ids_CJ.shape)
    for start, slab_XD in matmul.slabs(head_VD, slab_ids):
        # Contiguous also for the last slab, which is narrower.
        exps = [buffer[: m * len(slab_XD)].view(m, len(slab_XD)) for buffer in buffers]
        matmul.logits_(exps[0], hidden_MD, slab_XD)
        picks.take_(exps[0], z_MJ, start)
        larger_M = torch.maximum(max_M, exps[0].amax(1))
        # While only gathered ids have been seen, exp(-inf - 0) gives the correct 0.
        base_M = torch.where(larger_M == -torch.inf, 0.0, larger_M)
        exps[0].sub_(base_M[:, None])
        for exp_MX in exps[1:]:
            exp_MX.copy_(exps[0])
        for exp_MX, running in zip(exps, rests, strict=True):
            t = running.rest.temperature
            running.add_((exp_MX if t == 1 else exp_MX.div_(t)).exp_(), slab_XD, ((max_M - base_M) / t).exp())
        max_M.copy_(larger_M)
    return z_MJ, rests


@dataclass(frozen=True, eq=False)
class _Picks:
    """The entries of the gathered ids, flattened and in the order of their slabs."""

    order: Tensor
    """int64, shape [M * J]: indices into the flattened ids."""
    ids: Tensor
    """int64, shape [M * J]: the ids in that order."""
    bounds: list[int]
    """Where each slab's entries begin, and where the last one's end."""
    num_ids: int
    """Number of gathered ids of a row, J."""
    slab_ids: int
    """Ids of a slab."""

    @staticmethod
    def of(gathered: GatheredIds, vocab: int, slab_ids: int) -> _Picks:
        ids, order = gathered.ids_CJ.reshape(-1).sort()
        firsts = torch.arange(0, vocab + slab_ids, slab_ids, device=ids.device)
        return _Picks(order, ids, torch.searchsorted(ids, firsts).tolist(), gathered.ids_CJ.shape[1], slab_ids)

    def take_(self, z_MX: Tensor, z_MJ: Tensor, start: int) -> None:
        """Move the gathered logits of the slab that begins at id `start` to `z_MJ`, leaving -inf in their places."""
        slab = slice(*self.bounds[start // self.slab_ids : start // self.slab_ids + 2])
        order_P = self.order[slab]
        place_P = order_P // self.num_ids * z_MX.shape[1] + (self.ids[slab] - start)
        z_MJ.view(-1)[order_P] = z_MX.view(-1)[place_P]
        z_MX.view(-1).index_fill_(0, place_P, -torch.inf)
