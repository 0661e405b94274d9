"""Matrix products with the head whose sums stay float32, also where hidden states and head are bfloat16.

Legend of shape suffixes: M rows of a block, J gathered ids, X ids of a slab, D hidden size, V vocabulary.

A logit rounded to bfloat16 is off by up to |z| / 256, and near p = q so is every probability; the gradient, a
difference of the two, is then mostly noise. On a GPU the product returns its float32 sums. On a CPU PyTorch rounds
them, so there the head is widened one slab at a time, and both products use the widened slab.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def operand_dtype(head_VD: Tensor) -> torch.dtype:
    """Return the dtype in which a slab of the head is multiplied: its own, but at least float32 on a CPU."""
    return head_VD.dtype if head_VD.is_cuda else torch.promote_types(head_VD.dtype, torch.float32)


def slabs(head_VD: Tensor, slab_ids: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the first id and the rows of each slab, in `operand_dtype`; a widened slab is overwritten by the next one."""
    dtype = operand_dtype(head_VD)
    buffer_XD = None if head_VD.dtype == dtype else head_VD.new_empty(head_VD[:slab_ids].shape, dtype=dtype)
    for start in range(0, head_VD.shape[0], slab_ids):
        slab_XD = head_VD[start : start + slab_ids]
        yield start, slab_XD if buffer_XD is None else buffer_XD[: len(slab_XD)].copy_(slab_XD)


def logits_(out_MX: Tensor, hidden_MD: Tensor, slab_XD: Tensor) -> None:
    """Write hidden @ slab.T into `out_MX`, float32 (float64 for float64 inputs)."""
    if out_MX.dtype == slab_XD.dtype:
        torch.mm(hidden_MD, slab_XD.T, out=out_MX)
    else:
        torch.mm(hidden_MD, slab_XD.T, out_dtype=out_MX.dtype, out=out_MX)


def add_product_(out_MD: Tensor, weights_MX: Tensor, slab_XD: Tensor) -> None:
    """Add weights @ slab to `out_MD`, summing in its dtype; on a GPU the weights are first rounded to the slab's dtype."""
    if slab_XD.is_cuda and out_MD.dtype != slab_XD.dtype:
        torch.addmm(out_MD, weights_MX.to(slab_XD.dtype), slab_XD, out_dtype=out_MD.dtype, out=out_MD)
    else:
        out_MD.addmm_(weights_MX.to(out_MD.dtype), slab_XD.to(out_MD.dtype))


def add_gathered_(out_MD: Tensor, weights_MJ: Tensor, ids_MJ: Tensor, head_VD: Tensor, *, room: int) -> None:
    """Add to each row the weighted sum of the head's rows at its ids; weights and sums have `out_MD`'s dtype.

    Args:
        room: bytes for temporary sums or copies of the head's rows; at least one row is held at a time.
    """
    size = head_VD.shape[1]
    if head_VD.dtype == out_MD.dtype:
        num_rows = max(1, room // (size * out_MD.element_size()))
        for row in range(0, len(out_MD), num_rows):
            part = slice(row, row + num_rows)
            out_MD[part] += F.embedding_bag(ids_MJ[part], head_VD, per_sample_weights=weights_MJ[part], mode="sum")
        return
    # `embedding_bag` would round its sums to the head's dtype. Each row is held both as it is and widened.
    at_once = max(1, room // (size * (head_VD.element_size() + out_MD.element_size())))
    num_ids = min(ids_MJ.shape[1], at_once)
    num_rows = at_once // num_ids
    for row in range(0, len(out_MD), num_rows):
        for start in range(0, ids_MJ.shape[1], num_ids):
            block = (slice(row, row + num_rows), slice(start, start + num_ids))
            gathered_MJD = head_VD[ids_MJ[block]].to(out_MD.dtype)
            out_MD[block[0]] += torch.bmm(weights_MJ[block][:, None], gathered_MJD)[:, 0]
