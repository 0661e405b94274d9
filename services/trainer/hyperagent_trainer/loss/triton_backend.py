"""Compute the loss over blocks of rows and slabs of the vocabulary with Triton kernels, on a GPU in less than 64 MiB.

Legend of shape suffixes: N supervised rows, M rows of a block, X ids of a slab, T tiles of a slab, J gathered ids,
D hidden size, V vocabulary.

The part of the gradient that comes from the ids not gathered, the sum of softmax(z) over them times their rows of the
head, is attention with the hidden state as query and the head as keys and values. It is computed as FlashAttention does
(arXiv:2205.14135): slab by slab, with a running maximum and a running sum. One kernel multiplies, takes out the gathered
ids and exponentiates, so logits never reach memory; the second product uses the vendor's library. Both products are done
once, 4 N D V operations in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hyperagent.errors import InvalidRequest
from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss import matmul
from hyperagent_trainer.loss.kernels import add_gathered, exponentiate_slab, fold_slab
from hyperagent_trainer.loss.row_terms import GatheredIds, Objective, Rest, gather_ids, row_terms

# Limits the memory of the float64 arrays from which the rows' terms are computed.
_TERM_ROWS = 512
# Sorts after every id, so that no tile contains it.
_NOWHERE = 2**31 - 1


@dataclass(frozen=True)
class Tiling:
    """Sizes of the pieces into which the work is split.

    At hidden size 2,048 in bfloat16 the defaults take 24 MiB for exponentials and 16 MiB for sums.
    """

    rows: int = 2048
    """Rows of a block."""
    slab_ids: int = 6144
    """Ids of a slab; a multiple of `tile_ids`."""
    tile_rows: int = 128
    """Rows of a kernel's tile."""
    tile_ids: int = 256
    """Ids of a kernel's tile."""


_DEFAULT = Tiling()


def loss_and_gradient(
    hidden_ND: Tensor,
    head_VD: Tensor,
    rows: TeacherRows,
    objective: Objective,
    *,
    wants_grad: bool,
    tiling: Tiling = _DEFAULT,
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of the rows' losses (float64) and, if `wants_grad`, its gradient in the hidden states' dtype.

    Args:
        head_VD: the output head without its padding rows.

    Raises:
        InvalidRequest: the hidden states are float64, or rows of the hidden states or of the head are not contiguous.
    """
    if hidden_ND.dtype == torch.float64:
        raise InvalidRequest('the Triton path computes in float32; take backend "torch" for float64')
    if hidden_ND.stride(1) != 1 or head_VD.stride(1) != 1:
        raise InvalidRequest("the Triton path needs hidden states and head with contiguous rows")
    n = hidden_ND.shape[0]
    grad_ND = torch.empty_like(hidden_ND) if wants_grad else None
    total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
    # Each further temperature needs its own sums in the same workspace.
    block_rows = tiling.rows // len(objective.temperatures)
    for start in range(0, n, block_rows):
        block = slice(start, min(start + block_rows, n))
        grad_MD = None if grad_ND is None else grad_ND[block]
        total += _block(hidden_ND[block], head_VD, rows[block], objective, grad_MD, tiling)
    return total, grad_ND


def _block(
    hidden_MD: Tensor,
    head_VD: Tensor,
    rows: TeacherRows,
    objective: Objective,
    grad_MD: Tensor | None,
    tiling: Tiling,
) -> Tensor:
    """Return the summed loss of a block's rows and write their gradient into `grad_MD`."""
    gathered = gather_ids(rows)
    passes = [
        _pass_over_vocabulary(hidden_MD, head_VD, gathered, t, tiling, wants_sums=grad_MD is not None)
        for t in objective.temperatures
    ]
    z_MJ = passes[0][0]
    total = torch.zeros((), dtype=torch.float64, device=hidden_MD.device)
    weights_MJ = torch.empty_like(z_MJ)
    for start in range(0, hidden_MD.shape[0], _TERM_ROWS):
        part = slice(start, start + _TERM_ROWS)
        rests = tuple(rest[part] for _, rest, _ in passes)
        terms = row_terms(z_MJ[part], gathered[part], rests, rows[part], objective)
        total += terms.loss_C.sum()
        weights_MJ[part] = terms.gathered_CJ
        for factor_C, (_, _, sums_MD) in zip(terms.rest_C, passes, strict=True):
            sums_MD[part] *= factor_C.float()[:, None]
    if grad_MD is not None:
        dense_MD = passes[0][2]
        for _, _, sums_MD in passes[1:]:
            dense_MD += sums_MD
        _write_gradient(grad_MD, dense_MD, weights_MJ, gathered, head_VD)
    return total


def _pass_over_vocabulary(
    hidden_MD: Tensor,
    head_VD: Tensor,
    gathered: GatheredIds,
    temperature: float,
    tiling: Tiling,
    *,
    wants_sums: bool,
) -> tuple[Tensor, Rest, Tensor]:
    """Return logits [M, J] at the gathered ids, the rest, and sums [M, D] of exp((z - max) / t) * head over the rest.

    Without `wants_sums` the sums have no columns.
    """
    (m, size), vocab = hidden_MD.shape, head_VD.shape[0]
    sorted_MJ, order_MJ = torch.where(gathered.is_live_CJ, gathered.ids_CJ, _NOWHERE).int().sort(dim=1)
    starts = torch.arange(0, vocab + tiling.tile_ids, tiling.tile_ids, device=hidden_MD.device, dtype=torch.int32)
    first_MT1 = torch.searchsorted(sorted_MJ, starts.expand(m, -1).contiguous(), out_int32=True)
    exp_MX = head_VD.new_empty(m, min(tiling.slab_ids, vocab))
    max_M = hidden_MD.new_full((m,), -torch.inf, dtype=torch.float32)
    sum_M, z_MJ = torch.zeros_like(max_M), max_M.new_zeros(sorted_MJ.shape)
    sums_MD = max_M.new_zeros(m, size if wants_sums else 0)
    for slab_start in range(0, vocab, tiling.slab_ids):
        slab_size = min(tiling.slab_ids, vocab - slab_start)
        num_tiles = triton.cdiv(slab_size, tiling.tile_ids)
        tile_max_MT, tile_sum_MT = max_M.new_empty(m, num_tiles), max_M.new_empty(m, num_tiles)
        exponentiate_slab[(triton.cdiv(m, tiling.tile_rows), num_tiles)](
            hidden_MD, head_VD, sorted_MJ, first_MT1, max_M, z_MJ, exp_MX, tile_max_MT, tile_sum_MT,
            m, vocab, slab_start, size, sorted_MJ.shape[1], num_tiles, first_MT1.shape[1], 1 / temperature,
            hidden_MD.stride(0), head_VD.stride(0), exp_MX.stride(0),
            BLOCK_M=tiling.tile_rows, BLOCK_X=tiling.tile_ids, BLOCK_D=128 // head_VD.element_size(), num_warps=8, num_stages=3,
        )  # fmt: skip
        fold_slab[(m,)](
            max_M, sum_M, tile_max_MT, tile_sum_MT, exp_MX, sums_MD,
            num_tiles, slab_size, sums_MD.shape[1], 1 / temperature, exp_MX.stride(0),
            BLOCK_T=triton.next_power_of_2(tiling.slab_ids // tiling.tile_ids), BLOCK_X=tiling.tile_ids, BLOCK_D=1024,
        )  # fmt: skip
        if wants_sums:
            matmul.add_product_(sums_MD, exp_MX[:, :slab_size], head_VD[slab_start : slab_start + slab_size])
    in_order_MJ = torch.empty_like(z_MJ).scatter_(1, order_MJ, z_MJ)
    return in_order_MJ, Rest(max_M, sum_M, temperature), sums_MD


def _write_gradient(
    grad_MD: Tensor, dense_MD: Tensor, weights_MJ: Tensor, gathered: GatheredIds, head_VD: Tensor
) -> None:
    block = 512
    add_gathered[(grad_MD.shape[0], triton.cdiv(grad_MD.shape[1], block))](
        grad_MD, dense_MD, weights_MJ, gathered.ids_CJ.contiguous(), head_VD,
        weights_MJ.shape[1], grad_MD.shape[1], grad_MD.stride(0), head_VD.stride(0),
        BLOCK_D=block,
    )  # fmt: skip
