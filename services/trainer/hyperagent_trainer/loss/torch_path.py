"""The loss over chunks of rows, in PyTorch alone: for a CPU, and for any GPU.

Legend of shape suffixes: N supervised rows, C rows of a chunk, J gathered ids, D hidden size, V vocabulary.

One buffer of [C, V] holds a chunk's logits, then exponentials, then their gradient, and is used again by the next chunk.
The gradient goes to the hidden states at once, so nothing of size V outlives its chunk (the idea of Liger-Kernel's
fused losses, arXiv:2410.10989), and the head, which is frozen, costs no third product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperagent_trainer.loss import products
from hyperagent_trainer.loss.row_terms import GatheredIds, Objective, Rest, RowTerms, TeacherRows, gather_ids, row_terms

# Float64 arrays of a row's terms that stand at once, for each kept id.
_TERM_BYTES = 24 * 8


def loss_and_gradient(
    hidden_ND: Tensor, head_VD: Tensor, rows: TeacherRows, objective: Objective, *, workspace: int, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the rows' losses, float64, and its gradient in the hidden states' dtype if asked for.

    Args:
        head_VD: without padding.
        workspace: bytes for the buffers of logits; at least one row is computed at a time.
    """
    n = hidden_ND.shape[0]
    chunk_rows = min(n, _chunk_rows(head_VD, rows, objective, workspace))
    buffers = _Buffers.of(head_VD, len(objective.temperatures), chunk_rows)
    grad_ND = torch.empty_like(hidden_ND) if wants_grad else None
    total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
    for start in range(0, n, chunk_rows):
        block = slice(start, min(start + chunk_rows, n))
        chunk = buffers.first(block.stop - start)
        products.logits_(chunk.z_CV, hidden_ND[block], head_VD)
        gathered = gather_ids(rows[block])
        z_CJ = chunk.z_CV.gather(1, gathered.ids_CJ)
        terms = row_terms(z_CJ, gathered, _rests_(chunk, gathered, objective.temperatures), rows[block], objective)
        total += terms.loss_C.sum()
        if grad_ND is not None:
            grad_ND[block] = _gradient_(chunk, gathered, terms, head_VD)
    return total, grad_ND


def _chunk_rows(head_VD: Tensor, rows: TeacherRows, objective: Objective, workspace: int) -> int:
    """Rows whose buffers fit into the workspace, or one."""
    (vocab, size), temperatures = head_VD.shape, len(objective.temperatures)
    # Logits and the gradient of the hidden states; for bfloat16 the rounded weights and the widened hidden states too.
    per_row = max(4, head_VD.element_size()) * (vocab * temperatures + size) + _TERM_BYTES * rows.ids_NK.shape[1]
    if head_VD.dtype == torch.bfloat16:
        per_row += 2 * vocab + 4 * size
    return max(1, (workspace - products.fixed_bytes(head_VD)) // per_row)


@dataclass(frozen=True, eq=False)
class _Buffers:
    """What every chunk is computed in."""

    z_CV: Tensor
    """float32 at least."""
    second_CV: Tensor | None
    """Like it, for the second temperature."""
    half_CV: Tensor | None
    """In the head's dtype, where that is a smaller one."""

    @staticmethod
    def of(head_VD: Tensor, num_temperatures: int, num_rows: int) -> _Buffers:
        """New ones for chunks of up to `num_rows` rows."""
        shape = (num_rows, head_VD.shape[0])
        z_CV = head_VD.new_empty(shape, dtype=torch.promote_types(head_VD.dtype, torch.float32))
        return _Buffers(
            z_CV,
            torch.empty_like(z_CV) if num_temperatures > 1 else None,
            head_VD.new_empty(shape) if z_CV.dtype != head_VD.dtype else None,
        )

    def first(self, num_rows: int) -> _Buffers:
        """Their first rows, as the last chunk needs them."""
        second_CV = None if self.second_CV is None else self.second_CV[:num_rows]
        return _Buffers(self.z_CV[:num_rows], second_CV, None if self.half_CV is None else self.half_CV[:num_rows])


def _rests_(chunk: _Buffers, gathered: GatheredIds, temperatures: tuple[float, ...]) -> tuple[Rest, ...]:
    """Turn the logits into exponentials relative to the largest, 0 at the gathered ids, at each temperature."""
    z_CV = chunk.z_CV.scatter_(1, gathered.ids_CJ, -torch.inf)
    max_C = z_CV.amax(1)
    # With every id gathered, exp(-inf - 0) is the 0 that there should be.
    z_CV.sub_(torch.where(max_C == -torch.inf, 0.0, max_C)[:, None])
    buffers = [z_CV] if chunk.second_CV is None else [z_CV, chunk.second_CV.copy_(z_CV)]
    rests = []
    for buffer_CV, temperature in zip(buffers, temperatures, strict=True):
        if temperature != 1:
            buffer_CV.div_(temperature)
        rests.append(Rest(max_C, buffer_CV.exp_().sum(1), temperature))
    return tuple(rests)


def _gradient_(chunk: _Buffers, gathered: GatheredIds, terms: RowTerms, head_VD: Tensor) -> Tensor:
    """The gradient of the chunk's hidden states; turns the exponentials into that of the logits."""
    z_CV = chunk.z_CV.mul_(terms.rest_C[0].to(chunk.z_CV.dtype)[:, None])
    if chunk.second_CV is not None:
        z_CV.addcmul_(chunk.second_CV, terms.rest_C[1].to(z_CV.dtype)[:, None])
    weights_CJ = terms.gathered_CJ.to(z_CV.dtype)
    grad_CD = z_CV.new_zeros(z_CV.shape[0], head_VD.shape[1])
    if chunk.half_CV is None:
        # A dead entry repeats the first id, so it must write what that writes.
        z_CV.scatter_(1, gathered.ids_CJ, torch.where(gathered.is_live_CJ, weights_CJ, weights_CJ[:, :1]))
        products.add_product_(grad_CD, z_CV, head_VD)
        return grad_CD
    # Only the rest, whose total weight is about that of the tail, is rounded to bfloat16.
    products.add_product_(grad_CD, chunk.half_CV.copy_(z_CV), head_VD)
    products.add_gathered_(grad_CD, weights_CJ, gathered.ids_CJ, head_VD)
    return grad_CD
