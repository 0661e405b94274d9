"""Compute a linear layer and its LoRA delta in one matrix product, for dtypes that lose accuracy in a separate addition.

    y = x W' + s (x A') B' = [x | x A'] [W | s B]'

A complete bfloat16 product is rounded to 8 significant bits, and a delta that is added afterwards is rounded to those 8
bits too: where it is 0.4 % of the output, as early in training, rounding drops 3 % of it, the same 3 % in every step. Here
the delta is among the terms that the product sums in float32, so it is rounded together with the output and complete on
average.

Legend of shape suffixes: B samples, T tokens, I and O input and output features, R rank, K = I + R, N tokens of one block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens per product, by device type: [x | x A'] copies x, one block of tokens at a time. The fastest of 512 to 8,192 on a
CPU; not yet measured on a GPU, where it is large enough for the launch of a product to cost little in comparison."""


def augmented_linear(
    x_BTI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_BRI: Tensor, b_BOR: Tensor, *, scale: float, zero: bool
) -> Tensor:
    """Return x @ weight.T + bias + scale * x @ a.T @ b.T, shape [B, T, O], rounded once, in the dtype of x.

    Gradients reach x, a and b; the weight and the bias are frozen and may have a wider dtype than x.

    Args:
        zero: whether b is all zero. The product then has the same bits as the frozen layer's own, whereas one over K
            instead of I terms may sum in another order. Gradients are computed as for any other b.
    """
    return _AugmentedLinear.apply(x_BTI, weight_OI, bias_O, a_BRI.to(x_BTI.dtype), b_BOR.to(x_BTI.dtype), scale, zero)


class _AugmentedLinear(torch.autograd.Function):
    """Saves x, the frozen weight, both factors and x A', which has R / I of the size of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_BRI: Tensor,
        b_BOR: Tensor,
        scale: float,
        zero: bool,
    ) -> Tensor:
        low_BTR = torch.bmm(x_BTI, a_BRI.transpose(1, 2))
        ctx.save_for_backward(x_BTI, weight_OI, a_BRI, b_BOR, low_BTR)
        ctx.scale = scale
        bias_O = None if bias_O is None else bias_O.to(x_BTI.dtype)
        if zero:
            return F.linear(x_BTI, weight_OI.to(x_BTI.dtype), bias_O)
        return _product(x_BTI, low_BTR, weight_OI, bias_O, b_BOR * scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, weight_OI, a_BRI, b_BOR, low_BTR = ctx.saved_tensors
        dlow_BTR = torch.bmm(dy_BTO, b_BOR).mul_(ctx.scale)
        dx_BTI = da_BRI = db_BOR = None
        if ctx.needs_input_grad[0]:
            dx_BTI = torch.matmul(dy_BTO, weight_OI.to(dy_BTO.dtype)).baddbmm_(dlow_BTR, a_BRI)
        if ctx.needs_input_grad[3]:
            da_BRI = torch.bmm(dlow_BTR.transpose(1, 2), x_BTI)
        if ctx.needs_input_grad[4]:
            db_BOR = torch.bmm(low_BTR.transpose(1, 2), dy_BTO).mul_(ctx.scale).transpose(1, 2)
        return dx_BTI, None, None, da_BRI, db_BOR, None, None


def _product(x_BTI: Tensor, low_BTR: Tensor, weight_OI: Tensor, bias_O: Tensor | None, scaled_b_BOR: Tensor) -> Tensor:
    """Return [x | low] @ [weight | b].T + bias, shape [B, T, O], computed by sample and by block of tokens."""
    num, tokens, inputs = x_BTI.shape
    outputs, rank = scaled_b_BOR.shape[1:]
    y_BTO = x_BTI.new_empty(num, tokens, outputs)
    weight_OK = x_BTI.new_empty(outputs, inputs + rank)
    weight_OK[:, :inputs] = weight_OI
    step = _BLOCK_TOKENS[x_BTI.device.type]
    block_NK = x_BTI.new_empty(min(tokens, step), inputs + rank)
    for sample in range(num):
        # Only these columns differ between samples, so the weight is copied once for all samples.
        weight_OK[:, inputs:] = scaled_b_BOR[sample]
        for start in range(0, tokens, step):
            x_NI = x_BTI[sample, start : start + step]
            x_NK = block_NK[: len(x_NI)]
            x_NK[:, :inputs] = x_NI
            x_NK[:, inputs:] = low_BTR[sample, start : start + step]
            y_NO = y_BTO[sample, start : start + step]
            if bias_O is None:
                torch.mm(x_NK, weight_OK.T, out=y_NO)
            else:
                torch.addmm(bias_O, x_NK, weight_OK.T, out=y_NO)
    return y_BTO
