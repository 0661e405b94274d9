"""Test which arguments the loss refuses, and how much memory it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from loss_oracle import Case, make_case
from pydantic import ValidationError
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hyperagent.errors import InvalidRequest
from hyperagent_trainer.loss.distillation import compute_distillation_loss
from hyperagent_trainer.loss.options import Divergence, LossOptions


def loss_of(case: Case, *, vocab_size: int = 40, temperature: float = 1.0, **settings: Any) -> Tensor:
    return compute_distillation_loss(case.hidden, case.head, case.rows(temperature), vocab_size=vocab_size, **settings)


def _changed(tensor: Tensor, *at: int, to: float) -> Tensor:
    changed = tensor.clone()
    changed[at] = to
    return changed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: replace(c, head=c.head.requires_grad_()), "must be frozen"),
        (lambda c: replace(c, hidden=c.hidden[:0], ids=c.ids[:0], logprobs=c.logprobs[:0], tail=c.tail[:0]), "no superv"),
        (lambda c: replace(c, tail=c.tail[:3]), "disagree in shape"),
        (lambda c: replace(c, logprobs=c.logprobs[:, :4]), "disagree in shape"),
        (lambda c: replace(c, hidden=c.hidden[:, :5]), "are needed, got"),
        (lambda c: replace(c, hidden=c.hidden.half(), head=c.head.half()), "must be of one type"),
        (lambda c: replace(c, hidden=c.hidden.bfloat16()), "must be of one type"),
        (lambda c: replace(c, ids=c.ids.int()), "must be int64"),
        (lambda c: replace(c, head=c.head[:30]), "different tokenizer"),
        (lambda c: replace(c, logprobs=_changed(c.logprobs, 0, 2, to=torch.nan)), "of the teacher is NaN"),
        (lambda c: replace(c, tail=_changed(c.tail, 3, to=torch.nan)), "of the teacher is NaN"),
        (lambda c: replace(c, ids=_changed(c.ids, 2, 1, to=40)), "outside.* different tokenizers"),
        (lambda c: replace(c, ids=_changed(c.ids, 2, 1, to=-1)), "outside.* different tokenizers"),
        (lambda c: replace(c, ids=_changed(c.ids, 2, 1, to=int(c.ids[2, 0]))), "1 of 4 rows: an id is kept twice"),
        (lambda c: replace(c, logprobs=_changed(c.logprobs, 2, 4, to=-torch.inf)), "marks padding"),
        (lambda c: replace(c, logprobs=_changed(c.logprobs, 2, 0, to=-torch.inf)), "marks padding"),
        (lambda c: replace(c, logprobs=c.logprobs + 0.1), "4 of 4 rows: .* do not sum to 1"),
        (lambda c: replace(c, tail=_changed(c.tail, 3, to=torch.inf)), "do not sum to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(damage: Callable[[Case], Case], message: str) -> None:
    case = make_case(4, 5, 40, std=1.0)
    loss_of(case)

    with pytest.raises(InvalidRequest, match=message):
        loss_of(damage(case))


def test_ids_of_the_padded_vocabulary_are_refused() -> None:
    case = make_case(4, 5, 40)
    with pytest.raises(InvalidRequest, match=r"outside \[0, 39\)"):
        loss_of(replace(case, ids=_changed(case.ids, 0, 0, to=39)), vocab_size=39)


def test_a_tail_must_fit_what_is_left_out() -> None:
    whole, part = make_case(4, 40, 40), make_case(4, 5, 40, std=1.0)
    with pytest.raises(InvalidRequest, match="every id is kept, yet there is a tail"):
        loss_of(replace(whole, tail=_changed(whole.tail, 0, to=-12.0)))
    no_tail = replace(part, logprobs=part.logprobs.log_softmax(-1), tail=torch.full((4,), -torch.inf))
    assert loss_of(no_tail).isfinite()
    with pytest.raises(InvalidRequest, match="reverse KL is infinite"):
        loss_of(no_tail, options=LossOptions(divergence="reverse_kl"))


def test_settings_that_mean_nothing_are_refused() -> None:
    case = make_case(4, 5, 40)
    with pytest.raises(InvalidRequest, match="needs the target ids"):
        compute_distillation_loss(
            case.hidden,
            case.head,
            replace(case.rows(), target_ids_N=None),
            vocab_size=40,
            options=LossOptions(ce_weight=0.5),
        )
    with pytest.raises(InvalidRequest, match="a target id is outside"):
        loss_of(replace(case, target=torch.tensor([0, 1, 2, 40])), options=LossOptions(ce_weight=0.5))
    with pytest.raises(InvalidRequest, match="is no softmax"):
        loss_of(case, temperature=0.0)
    with pytest.raises(InvalidRequest, match="holds no logits"):
        loss_of(case, workspace_bytes=0)
    with pytest.raises(ValidationError, match="jsd_beta belongs to"):
        LossOptions(jsd_beta=0.1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_a_damaged_student_cannot_pass_as_a_loss(divergence: Divergence, ce_weight: float, value: float) -> None:
    case = make_case(4, 5, 40, std=1.0)
    options = LossOptions(divergence=divergence, ce_weight=ce_weight)
    outside = next(i for i in range(40) if i not in case.ids[0])
    for id_ in (outside, int(case.ids[0, 0])):
        assert not loss_of(replace(case, head=_changed(case.head, id_, 0, to=value)), options=options).isfinite()
    assert not loss_of(replace(case, hidden=_changed(case.hidden, 1, 2, to=value)), options=options).isfinite()


def test_the_gradient_can_be_taken_only_once() -> None:
    case = make_case(4, 5, 40)
    hidden = case.hidden.requires_grad_()
    with pytest.raises(InvalidRequest, match="differentiable once"):
        torch.autograd.grad(loss_of(case), hidden, create_graph=True)


def peak_bytes(case: Case, folder: Path, *, temperature: float = 1.0, **settings: Any) -> int:
    """Return torch's peak memory above its memory before the call, in bytes as its allocator reports them."""
    hidden = case.hidden.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.empty(1)
        loss = compute_distillation_loss(hidden, case.head, case.rows(temperature), **settings)
        # `backward` would copy the gradient into a leaf's; a network's hidden states are no leaf.
        torch.autograd.grad(loss, hidden)
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held = [e["args"]["Total Allocated"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(held) - held[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_memory_is_bounded_whatever_the_number_of_rows(ce_weight: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """2,000 rows of logits would take 64 MB; the kept gradient takes 0.1 MB."""
    workspace = 2**24
    options = LossOptions(ce_weight=ce_weight)
    for n in (200, 2000):
        case = make_case(n, 16, 8000, size=16, dtype=dtype)
        peak = peak_bytes(case, tmp_path, vocab_size=8000, options=options, temperature=2.0, workspace_bytes=workspace)
        assert peak < workspace + 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_one_gradient_of_the_hidden_states_is_ever_held(dtype: torch.dtype, tmp_path: Path) -> None:
    case = make_case(16_000, 4, 64, size=1024, dtype=dtype)

    peak = peak_bytes(case, tmp_path, vocab_size=64, workspace_bytes=2**24)

    assert peak < case.hidden.nbytes + 2**24 + 2**22
