"""Compute the divergence from the teacher's rows to the student's distribution, fused with its frozen output head.

Legend of shape suffixes: N supervised rows, K kept ids, D hidden size, V vocabulary.

The teacher's row is a distribution over K + 1 outcomes, its kept ids S and "any other id" R, and the student's softmax
q is put into the same buckets. A divergence of the buckets is a lower bound of that over the whole vocabulary (data
processing), equal to it where every id is kept; dropping the tail or renormalizing the kept ids would instead reward
the student for moving mass into R.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hyperagent.errors import InvalidRequest
from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss import torch_backend
from hyperagent_trainer.loss.options import LossBackend, LossOptions
from hyperagent_trainer.loss.row_terms import Objective
from hyperagent_trainer.loss.validation import check_arguments, check_values

_CPU_WORKSPACE = 96 * 2**20
_GPU_WORKSPACE = 600 * 2**20
_BACKWARD_ROWS = 512


def compute_distillation_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    rows: TeacherRows,
    *,
    vocab_size: int,
    options: LossOptions | None = None,
    scale: float = 1.0,
    workspace_bytes: int | None = None,
    backend: LossBackend = "auto",
) -> Tensor:
    """Return `scale` times the sum of the rows' losses in nats: a scalar, differentiable once, in the hidden states only.

    A row's loss is (1 - w) * t**2 * divergence(teacher || student) + w * cross-entropy, both as in Hinton et al.
    (arXiv:1503.02531, section 2). The divergence compares the softmaxes at temperature t; the factor t**2 keeps its
    gradients as large as they are at temperature 1. The cross-entropy with the actual token is taken at temperature 1;
    w is `options.ce_weight`. The loss is never negative.

    The gradient is computed in the forward pass and kept, N * D values; apart from it, memory does not grow with N. The
    backward pass scales it in place, or scales a copy of it if the graph is retained.

    Args:
        hidden_ND: the student's final hidden states at the supervised rows, in the head's dtype: bfloat16, float32 or
            float64. Logits and sums are float32 at least.
        head_VD: the student's frozen output head. It and the hidden states are not checked for NaN or infinity; with
            either, the loss is not finite.
        rows: the teacher's rows, each normalized together with its tail. Their temperature t, above 0, applies to both
            softmaxes. The cross-entropy needs their target ids.
        vocab_size: number of real entries; the head's rows from there on are padding and are ignored.
        options: forward KL without cross-entropy by default.
        scale: 1 / (supervised rows of the whole optimizer step) gives nats per supervised token. Multiplying the result
            by the factor instead has the same effect, but rounds a bfloat16 gradient a second time.
        workspace_bytes: size of the buffers for logits; 96 MiB on a CPU and 600 MiB on a GPU by default. The Triton path
            has a fixed workspace below 64 MiB.
        backend: "auto" means torch. The Triton kernels are tested in Triton's interpreter only, so they run only on
            request until they have been compiled and measured on a GPU. They compute in bfloat16 and float32.

    Raises:
        InvalidRequest: the head is not frozen, there are no rows, the teacher's rows hold NaN, or shapes, types, ids or
            normalization are wrong. The backward pass raises it under `create_graph`.
    """
    options = options or LossOptions()
    if options.ce_weight and rows.target_ids_N is None:
        raise InvalidRequest(f"a ce_weight of {options.ce_weight} needs the target ids; give rows.target_ids_N")
    if not options.ce_weight:
        # Without cross-entropy the target is an id like any other and needs no entry of its own.
        rows = replace(rows, target_ids_N=None)
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden_ND.device)
    check_backend(backend, hidden_ND.device)
    check_arguments(hidden_ND, head_VD, rows, vocab_size, workspace_bytes)
    check_values(rows, vocab_size=vocab_size, options=options)
    loss: Tensor = _FusedLoss.apply(
        hidden_ND,
        head_VD[:vocab_size],
        rows,
        Objective(options, rows.temperature, scale),
        workspace_bytes,
        backend,
    )
    return loss


def default_workspace_bytes(device: torch.device) -> int:
    """Return the default size in bytes of the loss's buffers for logits on a device."""
    return _GPU_WORKSPACE if device.type == "cuda" else _CPU_WORKSPACE


def check_backend(backend: LossBackend, device: torch.device) -> None:
    """Refuse a backend that cannot run on the device.

    Raises:
        InvalidRequest: "triton" without the triton package, or on a CPU without Triton's interpreter.
    """
    can_triton = find_spec("triton") and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET"))
    if backend == "triton" and not can_triton:
        raise InvalidRequest('backend "triton" needs the triton package and a GPU; take "torch" or "auto"')


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        rows: TeacherRows,
        objective: Objective,
        workspace: int,
        backend: LossBackend,
    ) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        # Autocast would silently downcast the matrix products to bfloat16.
        with torch.autocast(hidden_ND.device.type, enabled=False):
            if backend == "triton":
                from hyperagent_trainer.loss import triton_backend

                total, grad_ND = triton_backend.loss_and_gradient(
                    hidden_ND, head_VD, rows, objective, wants_grad=wants_grad
                )
            else:
                total, grad_ND = torch_backend.loss_and_gradient(
                    hidden_ND, head_VD, rows, objective, workspace=workspace, wants_grad=wants_grad
                )
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return total if hidden_ND.dtype == torch.float64 else total.float()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # `once_differentiable` would return a second derivative of 0 when the incoming factor is a constant.
            raise InvalidRequest("the distillation loss is differentiable once; call backward without create_graph")
        (grad_ND,) = ctx.saved_tensors
        # If the graph is freed after this pass, nothing else reads the gradient, so it can be overwritten.
        is_retained = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled_ND = torch.empty_like(grad_ND) if is_retained else grad_ND
        # In blocks and in float32: a factor rounded to bfloat16 would be an error shared by all rows.
        for start in range(0, grad_ND.shape[0], _BACKWARD_ROWS):
            block = slice(start, start + _BACKWARD_ROWS)
            scaled_ND[block] = grad_ND[block] * grad_total[None, None]
        return scaled_ND, None, None, None, None, None
