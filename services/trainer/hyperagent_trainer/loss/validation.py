"""Validate the loss's arguments, with a separate message for each fault.

Legend of shape suffixes: N supervised rows, C rows of a block, K kept ids, D hidden size, V vocabulary.

Shapes and types are compared on the host. The tensors' values are checked in blocks of rows, and all results come to
the host together: one synchronization, however many checks and rows there are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hyperagent.errors import InvalidRequest
from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss.options import LossOptions

DTYPES = (torch.bfloat16, torch.float32, torch.float64)

# Holds for log-probabilities in float32, and for a codec's 8 bits once its reader has normalized them.
_SUM_TOLERANCE = 1e-3
_BLOCK_IDS = 2**19


def check_arguments(hidden_ND: Tensor, head_VD: Tensor, rows: TeacherRows, vocab_size: int, workspace: int) -> None:
    """Check everything that does not depend on the tensors' values.

    Raises:
        InvalidRequest: the head is not frozen, there are no rows, or shapes, types or devices do not match.
    """
    if head_VD.requires_grad:
        raise InvalidRequest("the output head must be frozen: this loss computes no gradient for it")
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or rows.ids_NK.ndim != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise InvalidRequest(
            f"hidden [N, D], head [V, D] and ids [N, K] are needed, got {tuple(hidden_ND.shape)}, "
            f"{tuple(head_VD.shape)} and {tuple(rows.ids_NK.shape)}"
        )
    n, k = rows.ids_NK.shape
    if n == 0 or k == 0:
        raise InvalidRequest(
            f"there are no supervised rows or no kept ids: the ids have shape {(n, k)}; give at least one of each"
        )
    others = [rows.logprobs_NK, rows.tail_logmass_N] + ([] if rows.target_ids_N is None else [rows.target_ids_N])
    if hidden_ND.shape[0] != n or [tuple(t.shape) for t in others] != [(n, k), (n,), (n,)][: len(others)]:
        raise InvalidRequest(
            f"rows disagree in shape: hidden {tuple(hidden_ND.shape)}, ids {(n, k)}, then "
            f"{', '.join(str(tuple(t.shape)) for t in others)}"
        )
    if hidden_ND.dtype != head_VD.dtype or hidden_ND.dtype not in DTYPES:
        raise InvalidRequest(
            f"hidden states ({hidden_ND.dtype}) and head ({head_VD.dtype}) must be of one type: bfloat16, float32 or float64"
        )
    integers = [rows.ids_NK, *others[2:]]
    if any(t.dtype != torch.int64 for t in integers) or not all(t.is_floating_point() for t in others[:2]):
        raise InvalidRequest("ids must be int64, log-probabilities floating point")
    if len({t.device for t in (hidden_ND, head_VD, rows.ids_NK, *others)}) > 1:
        raise InvalidRequest("hidden states, head and the teacher's rows must be on one device")
    if not 1 <= vocab_size <= head_VD.shape[0]:
        raise InvalidRequest(
            f"vocab_size is {vocab_size}, but the head has {head_VD.shape[0]} rows; "
            "the head belongs to a different tokenizer"
        )
    if workspace < 1:
        raise InvalidRequest(f"a workspace of {workspace} bytes holds no logits; workspace_bytes must be at least 1")


def check_values(rows: TeacherRows, *, vocab_size: int, options: LossOptions) -> None:
    """Check the values of the teacher's rows.

    Hidden states and head are not checked: NaN or infinity in them makes the loss not finite.

    Raises:
        InvalidRequest: a value is wrong; the message names the fault and the number of rows that have it.
    """
    if not 0 < rows.temperature < float("inf"):
        raise InvalidRequest(f"a temperature of {rows.temperature} is no softmax; it must be finite and above 0")
    counts: dict[str, Tensor] = {}
    n, k = rows.ids_NK.shape
    block_rows = max(1, _BLOCK_IDS // k)
    for start in range(0, n, block_rows):
        for fault, is_bad_C in _faults(rows[start : start + block_rows], vocab_size, options):
            counts[fault] = counts.get(fault, 0) + is_bad_C.sum()
    for fault, count in zip(counts, torch.stack(list(counts.values())).tolist(), strict=True):
        if count:
            raise InvalidRequest(f"{count} of {n} rows: {fault}")


def _faults(rows: TeacherRows, vocab_size: int, options: LossOptions) -> Iterator[tuple[str, Tensor]]:
    """Yield each fault's description with a mask of the rows that have it."""
    ids_CK, logp_CK, tail_C = rows.ids_NK, rows.logprobs_NK, rows.tail_logmass_N
    is_live_CK = logp_CK > -torch.inf
    yield "a log-probability of the teacher is NaN", logp_CK.isnan().any(1) | tail_C.isnan()
    yield (
        f"a kept id is outside [0, {vocab_size}), so teacher and student belong to different tokenizers",
        ((ids_CK < 0) | (ids_CK >= vocab_size)).any(1),
    )
    yield (
        "log-probability -inf marks padding, which must follow the kept ids and repeat the first of them",
        ~is_live_CK[:, 0] | (~is_live_CK & (ids_CK != ids_CK[:, :1])).any(1),
    )
    distinct = -1 - torch.arange(ids_CK.shape[1], device=ids_CK.device)
    in_order_CK = torch.where(is_live_CK, ids_CK, distinct).sort(dim=1).values
    yield "an id is kept twice", (in_order_CK[:, 1:] == in_order_CK[:, :-1]).any(1)
    total_C = logp_CK.exp().sum(1) + tail_C.exp()
    yield (
        f"the teacher's kept ids and tail do not sum to 1 within {_SUM_TOLERANCE}; normalize them at the temperature",
        ~((total_C - 1).abs() <= _SUM_TOLERANCE),
    )
    keeps_all_C = is_live_CK.sum(1) == vocab_size
    yield "every id is kept, yet there is a tail; the tail must be -inf", keeps_all_C & (tail_C > -torch.inf)
    if options.divergence == "reverse_kl":
        yield (
            "the teacher's tail is -inf though ids are left out, so reverse KL is infinite; choose jsd or forward_kl",
            ~keeps_all_C & (tail_C == -torch.inf),
        )
    if rows.target_ids_N is not None:
        yield f"a target id is outside [0, {vocab_size})", (rows.target_ids_N < 0) | (rows.target_ids_N >= vocab_size)
