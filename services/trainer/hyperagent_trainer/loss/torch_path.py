"""The loss over chunks of rows, in PyTorch alone: for a CPU, and for any GPU.

Legend of shape suffixes: N supervised rows, C rows of a chunk, J gathered ids, D hidden size, V vocabulary.

One buffer of [C, V] holds a chunk's logits, then exponentials, then their gradient, and is used again by the next chunk.
The gradient goes to the hidden states at once, so nothing of size V outlives its chunk (the idea of Liger-Kernel's
fused losses, arXiv:2410.10989), and the head, which is frozen, costs no third product.
"""

from __future__ import annotations

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
    buffers = _Buffers(head_VD, objective, min(n, _chunk_rows(head_VD, rows, objective, workspace)))
    grad_ND = torch.empty_like(hidden_ND) if wants_grad else None
    total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
    for start in range(0, n, buffers.num_rows):
        block = slice(start, min(start + buffers.num_rows, n))
        chunk = buffers.first(block.stop - start)
        products.logits_(chunk.z_CV, hidden_ND[block], head_VD)
        gathered = gather_ids(rows[block])
        z_CJ = chunk.z_CV.gather(1, gathered.ids_CJ)
        terms = row_terms(z_CJ, gathered, chunk.rests_(gathered, objective), rows[block], objective)
        total += terms.loss_C.sum()
        if grad_ND is not None:
            grad_ND[block] = chunk.gradient_(gathered, terms, head_VD)
    return total, grad_ND


def _chunk_rows(head_VD: Tensor, rows: TeacherRows, objective: Objective, workspace: int) -> int:
    """Rows whose buffers fit into the workspace, or one."""
    per_logit = max(4, head_VD.element_size()) * len(objective.temperatures)
    if head_VD.dtype == torch.bfloat16:
        per_logit += head_VD.element_size()
    per_row = per_logit * head_VD.shape[0] + _TERM_BYTES * rows.ids_NK.shape[1]
    return max(1, (workspace - products.fixed_bytes(head_VD)) // per_row)


class _Buffers:
    """What every chunk is computed in."""

    def __init__(self, head_VD: Tensor, objective: Objective, num_rows: int) -> None:
        shape, device = (num_rows, head_VD.shape[0]), head_VD.device
        dtype = torch.promote_types(head_VD.dtype, torch.float32)
        self.num_rows = num_rows
        self._z = torch.empty(shape, dtype=dtype, device=device)
        self._second = torch.empty_like(self._z) if len(objective.temperatures) > 1 else None
        self._half = torch.empty(shape, dtype=head_VD.dtype, device=device) if dtype != head_VD.dtype else None

    def first(self, num_rows: int) -> _Chunk:
        """The buffers' first rows, as the last chunk needs them."""
        return _Chunk(*(None if b is None else b[:num_rows] for b in (self._z, self._second, self._half)))


class _Chunk:
    """The buffers of one chunk."""

    def __init__(self, z_CV: Tensor, second_CV: Tensor | None, half_CV: Tensor | None) -> None:
        self.z_CV = z_CV
        self._second_CV = second_CV
        self._half_CV = half_CV

    def rests_(self, gathered: GatheredIds, objective: Objective) -> tuple[Rest, ...]:
        """Turn the logits into exponentials relative to the largest, 0 at the gathered ids, at each temperature."""
        z_CV = self.z_CV.scatter_(1, gathered.ids_CJ, -torch.inf)
        max_C = z_CV.amax(1)
        # With every id gathered, exp(-inf - 0) is the 0 that there should be.
        z_CV.sub_(torch.where(max_C == -torch.inf, 0.0, max_C)[:, None])
        buffers = [z_CV] if self._second_CV is None else [z_CV, self._second_CV.copy_(z_CV)]
        rests = []
        for buffer_CV, temperature in zip(buffers, objective.temperatures, strict=True):
            if temperature != 1:
                buffer_CV.div_(temperature)
            rests.append(Rest(max_C, buffer_CV.exp_().sum(1), temperature))
        return tuple(rests)

    def gradient_(self, gathered: GatheredIds, terms: RowTerms, head_VD: Tensor) -> Tensor:
        """The gradient of the chunk's hidden states; turns the exponentials into that of the logits."""
        z_CV, dtype = self.z_CV, self.z_CV.dtype
        z_CV.mul_(terms.rest_C[0].to(dtype)[:, None])
        if self._second_CV is not None:
            z_CV.addcmul_(self._second_CV, terms.rest_C[1].to(dtype)[:, None])
        weights_CJ = terms.gathered_CJ.to(dtype)
        if self._half_CV is None:
            # A dead entry repeats the first id, so it must write what that writes.
            z_CV.scatter_(1, gathered.ids_CJ, torch.where(gathered.is_live_CJ, weights_CJ, weights_CJ[:, :1]))
            return z_CV @ head_VD
        # Only the rest, whose total weight is about that of the tail, is rounded to bfloat16.
        grad_CD = torch.zeros(z_CV.shape[0], head_VD.shape[1], dtype=dtype, device=z_CV.device)
        products.add_product_(grad_CD, self._half_CV.copy_(z_CV), head_VD)
        products.add_gathered_(grad_CD, weights_CJ, gathered.ids_CJ, head_VD)
        return grad_CD
