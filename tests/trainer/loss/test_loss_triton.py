"""Test in Triton's interpreter that the Triton path gives the torch path's results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_oracle import Case, make_case, oracle, relative, top_rows
from torch import Tensor
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from hyperagent.errors import InvalidRequest
from hyperagent_trainer.loss import triton_backend
from hyperagent_trainer.loss.distillation import compute_distillation_loss
from hyperagent_trainer.loss.options import LossOptions
from hyperagent_trainer.loss.row_terms import Objective

OPTIONS = {
    "forward_kl": LossOptions(),
    "reverse_kl": LossOptions(divergence="reverse_kl"),
    "jsd": LossOptions(divergence="jsd"),
    "tvd": LossOptions(divergence="tvd"),
}
every_divergence = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix bfloat16: the interpreter stores it as integers of its bits, multiplies those integers, and rounds toward 0."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, cast(self, a, tl.float32), cast(self, b, tl.float32), *rest)

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, dtype: Any) -> TensorHandle:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        bits = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(bits, tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def in_small_tiles(case: Case, vocab: int, options: LossOptions, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return loss and gradient with blocks, slabs and tiles so small that each of them occurs more than once."""
    rows = case.rows(temperature) if options.ce_weight else replace(case.rows(temperature), target_ids_N=None)
    loss, gradient = triton_backend.loss_and_gradient(
        case.hidden, case.head[:vocab], rows, Objective(options, temperature, scale=1.0),
        wants_grad=True, tiling=triton_backend.Tiling(rows=16, slab_ids=64, tile_rows=8, tile_ids=32),
    )  # fmt: skip
    return loss, gradient


@every_divergence
@pytest.mark.parametrize("std", [1.0, pytest.param(30.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("k", [1, 16, pytest.param(137, marks=pytest.mark.slow)])
def test_float32_equals_the_definition(k: int, std: float, options: LossOptions) -> None:
    case = make_case(19, k, 137, std=std, size=70)

    loss, gradient = in_small_tiles(case, 137, options)

    expected, expected_gradient = oracle(case, 137, options)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6


@every_divergence
@pytest.mark.parametrize("temperature", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_temperature_cross_entropy_and_padding(temperature: float, options: LossOptions) -> None:
    options = options.model_copy(update={"ce_weight": 0.3})
    case = make_case(19, 6, 90)
    padded = replace(case, ids=case.ids.clone(), logprobs=case.logprobs.clone())
    padded.ids[3, 4:], padded.logprobs[3, 4:] = padded.ids[3, 0], -torch.inf

    loss, gradient = in_small_tiles(padded, 90, options, temperature)

    expected, expected_gradient = oracle(padded, 90, options, temperature=temperature)
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6


@every_divergence
def test_the_public_function_gives_the_same_by_either_path(options: LossOptions) -> None:
    """The tiles have a GPU's sizes, there are more rows and ids than in one tile, and the head's padding is large."""
    case = make_case(133, 16, 300)
    head = torch.cat([case.head, torch.full((7, 24), 100.0)])
    found = {}
    for backend in ("torch", "triton"):
        hidden = case.hidden.clone().requires_grad_()
        loss = compute_distillation_loss(hidden, head, case.rows(), vocab_size=300, options=options, backend=backend)
        loss.backward()
        assert hidden.grad is not None
        found[backend] = loss.detach().double(), hidden.grad.double()

    assert relative(found["triton"][0], found["torch"][0]) < 1e-6
    assert relative(found["triton"][1], found["torch"][1]) < 1e-6


def test_bfloat16_gradients_are_as_good_as_their_rounding() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(20, 64, generator=generator).div(8).bfloat16()
    head = torch.randn(300, 64, generator=generator).bfloat16()
    logits = hidden.double() @ head.double().T
    teacher = logits + 1e-3 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    case = Case(hidden, head, *top_rows(teacher, 64), torch.zeros(20, dtype=torch.int64))

    _, gradient = in_small_tiles(case, 300, LossOptions())

    _, expected = oracle(case, 300)
    assert float(F.cosine_similarity(gradient.double().flatten(), expected.flatten(), dim=0)) >= 0.9999
    assert relative(gradient, expected) <= 2e-3


@pytest.mark.parametrize("order", [1, -1])
def test_a_maximum_that_rises_or_falls_along_the_vocabulary(order: int) -> None:
    """Logits rise or fall by 1e4 over the slabs, so every slab, or only the first, brings the sums to a new reference."""
    head = torch.linspace(-order, order, 160)[:, None].repeat(1, 16)
    hidden = torch.full((18, 16), 625.0)
    case = Case(hidden, head, *top_rows(torch.zeros(18, 160, dtype=torch.float64), 5), torch.arange(18))

    loss, gradient = in_small_tiles(case, 160, LossOptions(ce_weight=0.5))

    expected, expected_gradient = oracle(case, 160, LossOptions(ce_weight=0.5))
    assert relative(loss, expected) < 1e-6
    assert relative(gradient, expected_gradient) < 1e-6


def test_a_damaged_head_cannot_pass_as_a_loss() -> None:
    case = make_case(4, 5, 40)
    case.head[next(i for i in range(40) if i not in case.ids[0]), 0] = torch.nan

    assert in_small_tiles(case, 40, LossOptions())[0].isnan()


def test_twice_the_same_bits() -> None:
    case = make_case(19, 16, 137)
    first, second = (in_small_tiles(case, 137, LossOptions()) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_float64_is_the_torch_paths() -> None:
    case = make_case(4, 5, 40, dtype=torch.float64)
    with pytest.raises(InvalidRequest, match='take backend "torch"'):
        compute_distillation_loss(case.hidden, case.head, case.rows(), vocab_size=40, backend="triton")


def test_without_a_gpu_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    case = make_case(4, 5, 40)
    with pytest.raises(InvalidRequest, match="needs the triton package and a GPU"):
        compute_distillation_loss(case.hidden, case.head, case.rows(), vocab_size=40, backend="triton")
