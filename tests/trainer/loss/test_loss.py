"""Test the loss against its definition: every divergence, number of kept ids, sharpness of the softmaxes and precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracle import Case, make_case, oracle, relative, top_rows
from torch import Tensor

from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss import torch_backend
from hyperagent_trainer.loss.distillation import compute_distillation_loss
from hyperagent_trainer.loss.options import LossOptions

OPTIONS = {
    "forward_kl": LossOptions(),
    "reverse_kl": LossOptions(divergence="reverse_kl"),
    "jsd": LossOptions(divergence="jsd"),
    "jsd_0.1": LossOptions(divergence="jsd", jsd_beta=0.1),
    "tvd": LossOptions(divergence="tvd"),
}
every_divergence = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(scope="module", autouse=True)
def narrow_slabs() -> Iterator[None]:
    """Use slabs so narrow that vocabularies of a few dozen ids are cut like real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "_SLAB_IDS", 29)
        yield


def loss_of(case: Case, vocab: int, *, temperature: float = 1.0, **settings_: Any) -> tuple[Tensor, Tensor]:
    """Return loss and gradient."""
    hidden = case.hidden.detach().clone().requires_grad_()
    loss = compute_distillation_loss(hidden, case.head, case.rows(temperature), vocab_size=vocab, **settings_)
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


@every_divergence
@pytest.mark.parametrize("std", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("k", [1, 16, 128, 301])
def test_float32_equals_the_definition(k: int, std: float, options: LossOptions) -> None:
    case = make_case(7, k, 301, std=std)

    loss, gradient = loss_of(case, 301, options=options, workspace_bytes=4096)

    expected, expected_gradient = oracle(case, 301, options)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6


@every_divergence
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
def test_temperature_and_cross_entropy(temperature: float, ce_weight: float, options: LossOptions) -> None:
    options = options.model_copy(update={"ce_weight": ce_weight})
    case = make_case(9, 5, 83)

    loss, gradient = loss_of(case, 83, options=options, temperature=temperature, workspace_bytes=2048)

    expected, expected_gradient = oracle(case, 83, options, temperature=temperature)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6


@every_divergence
@pytest.mark.parametrize(("n", "k", "vocab", "size"), [(1, 1, 2, 1), (1, 1, 7, 3), (5, 4, 33, 17), (3, 6, 6, 5)])
def test_odd_shapes(n: int, k: int, vocab: int, size: int, options: LossOptions) -> None:
    options = options.model_copy(update={"ce_weight": 0.5})
    case = make_case(n, k, vocab, size=size)

    loss, gradient = loss_of(case, vocab, options=options)

    expected, expected_gradient = oracle(case, vocab, options)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradcheck(temperature: float, options: LossOptions) -> None:
    options = options.model_copy(update={"ce_weight": 0.25})
    case = make_case(4, 5, 23, size=6, std=2.0, dtype=torch.float64)

    def loss(hidden: Tensor) -> Tensor:
        return compute_distillation_loss(hidden, case.head, case.rows(temperature), vocab_size=23, options=options)

    assert torch.autograd.gradcheck(loss, (case.hidden.requires_grad_(),), eps=1e-6, atol=1e-7)


def near_case(*, noise: float, std: float, dtype: torch.dtype) -> Case:
    """Make a case whose teacher has the student's own logits plus a little noise."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(24, 64, generator=generator).mul(std / 8).to(dtype)
    head = torch.randn(701, 64, generator=generator).to(dtype)
    logits = hidden.double() @ head.double().T
    teacher = logits + noise * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    return Case(hidden, head, *top_rows(teacher, 128), torch.zeros(24, dtype=torch.int64))


@every_divergence
@pytest.mark.parametrize(("noise", "std"), [(1e-3, 1.0), (1e-2, 10.0), (1.0, 3.0)])
@pytest.mark.parametrize("scale", [1.0, 1 / 24])
def test_bfloat16_gradients_are_as_good_as_their_rounding(
    noise: float, std: float, options: LossOptions, scale: float
) -> None:
    """Near p = q a gradient is a difference of nearly equal numbers; from bfloat16 logits it would be mostly noise.

    The one unavoidable rounding to bfloat16 takes 1.5e-3 to 1.8e-3 of the bound. Noise below a thousandth of the logits
    would be hidden by the rounding of float32 logits.
    """
    case = near_case(noise=noise, std=std, dtype=torch.bfloat16)

    _, gradient = loss_of(case, 701, options=options, scale=scale, workspace_bytes=2**20)

    assert gradient.dtype == torch.bfloat16
    expected = scale * oracle(case, 701, options)[1]
    assert float(F.cosine_similarity(gradient.double().flatten(), expected.flatten(), dim=0)) >= 0.9999
    assert relative(gradient, expected) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_is_a_factor_of_loss_and_gradient(dtype: torch.dtype) -> None:
    case = near_case(noise=1.0, std=3.0, dtype=dtype)

    loss, gradient = loss_of(case, 701)
    scaled, scaled_gradient = loss_of(case, 701, scale=0.125)

    assert torch.equal(scaled, loss * 0.125)
    assert torch.equal(scaled_gradient, gradient * 0.125)


def test_a_factor_of_the_result_reaches_a_bfloat16_gradient_unrounded() -> None:
    """Rounded to bfloat16, 1/3 is off by 0.13 %, and every gradient would be off by as much, all in one direction."""
    case = near_case(noise=1.0, std=3.0, dtype=torch.bfloat16)
    hidden = case.hidden.clone().requires_grad_()

    loss = compute_distillation_loss(hidden, case.head, case.rows(), vocab_size=701)
    (loss / 3).backward()

    _, expected = oracle(case, 701)
    assert hidden.grad is not None
    factor = float((hidden.grad.double() * expected).sum() / (expected * expected).sum())
    assert factor == pytest.approx(1 / 3, rel=2e-4)


def test_a_retained_graph_gives_its_gradient_again() -> None:
    case = make_case(6, 8, 90)
    hidden = case.hidden.requires_grad_()
    loss = compute_distillation_loss(hidden, case.head, case.rows(), vocab_size=90)

    (first,) = torch.autograd.grad(2 * loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, hidden)

    torch.testing.assert_close(second, 1.5 * first, rtol=1e-6, atol=0)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    noise=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 1.0]),
    std=st.sampled_from([0.01, 1.0, 10.0, 100.0]),
    k=st.sampled_from([1, 8, 40]),
)
def test_no_row_is_ever_negative(
    dtype: torch.dtype, options: LossOptions, seed: int, noise: float, std: float, k: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(1, 8, generator=generator).mul(std).to(dtype), torch.randn(40, 8, generator=generator)
    logits = hidden.double() @ head.to(dtype).double().T
    teacher = logits + noise * torch.randn(1, 40, generator=generator, dtype=torch.float64)
    ids, logprobs, tail = top_rows(teacher, k)

    rows = TeacherRows(ids, logprobs, tail)
    loss = compute_distillation_loss(hidden, head.to(dtype), rows, vocab_size=40, options=options)

    assert loss.item() >= 0


@every_divergence
def test_a_student_that_equals_the_teacher_has_no_loss_and_no_gradient(options: LossOptions) -> None:
    case = near_case(noise=0.0, std=3.0, dtype=torch.float32)

    loss, gradient = loss_of(case, 701, options=options)

    assert 0 <= loss.item() < 1e-4
    # Total variation has a kink there, so its gradient has the sign of rounding errors; each entry is at most q.
    assert float(gradient.abs().max()) < (3 if options.divergence == "tvd" else 1e-4)


@every_divergence
def test_huge_logits_stay_finite(options: LossOptions) -> None:
    head = torch.eye(8) * 1e4
    hidden = torch.cat([torch.eye(8), -torch.eye(8)])
    uniform = torch.zeros(16, 8, dtype=torch.float64)
    case = Case(hidden, head, *top_rows(uniform, 3), torch.arange(16) % 8)

    options = options.model_copy(update={"ce_weight": 0.5})
    loss, gradient = loss_of(case, 8, options=options)

    expected, expected_gradient = oracle(case, 8, options)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6


def test_a_sure_student_keeps_its_tail() -> None:
    """With logits this far apart 1 - sum(q) is 0 in float32 and its log -inf; a log-sum-exp of the others is finite."""
    head = torch.eye(8) * 60
    rows = torch.tensor([[0, 1]]), torch.tensor([[0.9, 0.06]]).log(), torch.tensor([0.04]).log()
    case = Case(torch.eye(8)[:1], head, *rows, torch.zeros(1, dtype=torch.int64))

    loss, gradient = loss_of(case, 8)

    expected, expected_gradient = oracle(case, 8)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6


@every_divergence
def test_the_order_of_the_kept_ids_is_indifferent(options: LossOptions) -> None:
    case = make_case(6, 16, 90)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = replace(case, ids=case.ids[:, order], logprobs=case.logprobs[:, order])

    loss, gradient = loss_of(case, 90, options=options)
    loss_again, gradient_again = loss_of(shuffled, 90, options=options)

    assert relative(loss_again, loss.double()) < 1e-7
    assert relative(gradient_again, gradient.double()) < 1e-6


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_the_blocks_is_indifferent(dtype: torch.dtype, options: LossOptions) -> None:
    case = make_case(41, 16, 90, dtype=dtype)
    options = options.model_copy(update={"ce_weight": 0.5})

    loss, gradient = loss_of(case, 90, options=options, temperature=2.0)
    for workspace in (1, 2**13, 2**15):
        loss_again, gradient_again = loss_of(case, 90, options=options, temperature=2.0, workspace_bytes=workspace)
        assert relative(loss_again, loss.double()) < 1e-6
        assert relative(gradient_again, gradient.double()) < (1e-6 if dtype == torch.float32 else 2e-3)


def test_with_every_id_kept_it_is_the_kl_of_the_whole_vocabulary() -> None:
    case = make_case(6, 40, 40)
    assert case.tail.isneginf().all()

    loss, _ = loss_of(case, 40)

    logq = (case.hidden.double() @ case.head.double().T).log_softmax(-1)
    logp = torch.zeros_like(logq).scatter_(1, case.ids, case.logprobs.double())
    assert relative(loss, F.kl_div(logq, logp, log_target=True, reduction="sum")) < 1e-6


@every_divergence
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 39))
def test_keeping_fewer_ids_never_shows_more_divergence(options: LossOptions, seed: int, k: int) -> None:
    """Data processing inequality: the divergence of buckets is at most that of the whole vocabulary."""
    few, all_ids = make_case(1, k, 40, seed=seed), make_case(1, 40, 40, seed=seed)

    assert loss_of(few, 40, options=options)[0] <= loss_of(all_ids, 40, options=options)[0] * (1 + 1e-6)


@every_divergence
def test_padding_rows_of_the_head_take_no_part(options: LossOptions) -> None:
    case = make_case(4, 5, 40)
    padded = replace(case, head=torch.cat([case.head, torch.full((24, 24), 100.0)]))

    loss, gradient = loss_of(case, 40, options=options)
    loss_padded, gradient_padded = loss_of(padded, 40, options=options)

    assert torch.equal(loss, loss_padded)
    torch.testing.assert_close(gradient_padded, gradient, rtol=1e-6, atol=0)


@every_divergence
def test_rows_that_keep_fewer_ids_are_padded(options: LossOptions) -> None:
    counts = [8, 3, 1, 8, 5, 2]
    options = options.model_copy(update={"ce_weight": 0.5})
    cut = [make_case(6, k, 40) for k in counts]
    ids, logprobs, tail = cut[0].ids.clone(), cut[0].logprobs.clone(), cut[0].tail.clone()
    for n, k in enumerate(counts):
        ids[n, k:], logprobs[n, k:], tail[n] = ids[n, 0], -torch.inf, cut[n].tail[n]
    case = replace(cut[0], ids=ids, logprobs=logprobs, tail=tail)

    loss, gradient = loss_of(case, 40, options=options, workspace_bytes=2048)

    expected, expected_gradient = oracle(case, 40, options)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6


def test_cross_entropy_alone_is_torchs() -> None:
    case = make_case(8, 5, 40)

    loss, gradient = loss_of(case, 40, options=LossOptions(ce_weight=1.0), temperature=3.0)

    hidden = case.hidden.double().requires_grad_()
    expected = F.cross_entropy(hidden @ case.head.double().T, case.target, reduction="sum")
    expected.backward()
    assert hidden.grad is not None
    assert relative(loss, expected.detach()) < 1e-6
    assert relative(gradient, hidden.grad) < 1e-6


def test_autocast_does_not_lower_the_precision() -> None:
    case = make_case(6, 8, 90)

    loss, gradient = loss_of(case, 90)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_again, gradient_again = loss_of(case, 90)

    assert torch.equal(loss, loss_again)
    assert torch.equal(gradient, gradient_again)


def test_without_a_gradient_the_loss_is_the_same() -> None:
    case = make_case(6, 8, 90)

    with torch.no_grad():
        loss = compute_distillation_loss(case.hidden, case.head, case.rows(), vocab_size=90)

    assert not loss.requires_grad
    assert torch.equal(loss, loss_of(case, 90)[0])
