"""Products with the head whose sums stay float32 to the end, also where hidden states and head are bfloat16.

Legend of shape suffixes: C rows of a chunk, J gathered ids, X ids of a slab, D hidden size, V vocabulary.

A logit rounded to bfloat16 is off by up to |z| / 256, and near p = q so is every probability: the gradient, a
difference of the two, is then mostly noise. On a GPU the product itself gives its float32 sums; PyTorch's products on
a CPU round them, so there the head is widened, a slab at a time. Slabs serve float32 on a CPU too: the math library
packs what it multiplies, and a whole chunk's logits packed would double the memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SLAB_IDS = 4096


def fixed_bytes(head_VD: Tensor) -> int:
    """Memory that the functions below take beside their arguments and results, whatever the number of rows."""
    if head_VD.dtype != torch.bfloat16:
        return 0
    slab = 0 if head_VD.is_cuda else min(_SLAB_IDS, head_VD.shape[0]) * head_VD.shape[1] * 4
    # Gathered rows of the head stand there twice, once as they are and once in float32.
    return max(slab, _gathered_bytes(head_VD) * 3 // 2)


def _gathered_bytes(head_VD: Tensor) -> int:
    """Of float32 rows of the head at once; a GPU needs more of them to be worth its launches."""
    return 2**27 if head_VD.is_cuda else 2**23


def logits_(out_CV: Tensor, hidden_CD: Tensor, head_VD: Tensor) -> None:
    """Write hidden @ head.T into `out_CV`, float32 (float64 for float64 inputs)."""
    if not head_VD.is_cuda:
        wide_CD = hidden_CD.to(out_CV.dtype)
        for ids, slab_XD in _slabs(head_VD, out_CV.dtype):
            torch.mm(wide_CD, slab_XD.T, out=out_CV[:, ids])
    elif head_VD.dtype == torch.bfloat16:
        torch.mm(hidden_CD, head_VD.T, out_dtype=torch.float32, out=out_CV)
    else:
        torch.mm(hidden_CD, head_VD.T, out=out_CV)


def _slabs(head_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Ids and their rows of the head, in `dtype`; a slab that had to be widened is overwritten by the next."""
    buffer_XD = None if head_VD.dtype == dtype else head_VD.new_empty(head_VD[:_SLAB_IDS].shape, dtype=dtype)
    for start in range(0, head_VD.shape[0], _SLAB_IDS):
        ids = slice(start, min(start + _SLAB_IDS, head_VD.shape[0]))
        slab_XD = head_VD[ids]
        yield ids, slab_XD if buffer_XD is None else buffer_XD[: len(slab_XD)].copy_(slab_XD)


def add_product_(out_CD: Tensor, weights_CV: Tensor, head_VD: Tensor) -> None:
    """Add weights @ head to `out_CD`; weights in the head's dtype, sums float32.

    On a CPU the product of bfloat16 is rounded once a slab before it is added.
    """
    if not head_VD.is_cuda:
        for ids, slab_XD in _slabs(head_VD, head_VD.dtype):
            if out_CD.dtype == head_VD.dtype:
                out_CD.addmm_(weights_CV[:, ids], slab_XD)
            else:
                out_CD += weights_CV[:, ids] @ slab_XD
    elif head_VD.dtype == torch.bfloat16:
        torch.addmm(out_CD, weights_CV, head_VD, out_dtype=torch.float32, out=out_CD)
    else:
        out_CD.addmm_(weights_CV, head_VD)


def add_gathered_(out_CD: Tensor, weights_CJ: Tensor, ids_CJ: Tensor, head_VD: Tensor) -> None:
    """Add to each row the sum of its ids' rows of the head, weighted; weights and sums float32."""
    at_once = max(1, _gathered_bytes(head_VD) // (4 * head_VD.shape[1]))
    num_ids = min(ids_CJ.shape[1], at_once)
    num_rows = at_once // num_ids
    for row in range(0, ids_CJ.shape[0], num_rows):
        for start in range(0, ids_CJ.shape[1], num_ids):
            block = (slice(row, row + num_rows), slice(start, start + num_ids))
            gathered_CJD = head_VD[ids_CJ[block]].float()
            out_CD[block[0]] += torch.bmm(weights_CJ[block][:, None], gathered_CJD)[:, 0]
