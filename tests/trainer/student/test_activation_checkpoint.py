"""Test layers that are run again in the backward pass: the gradient stays the same, and memory is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyperagent.architecture import routers
from hyperagent.errors import DataError
from hyperagent_trainer.student.activation_checkpoint import RoutingWatch, recomputed_layers, tiled_experts
from hyperagent_trainer.student.student import Student


@pytest.fixture
def student(student_folder: Path) -> Student:
    return Student(student_folder, device=torch.device("cpu"))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(250, (2, 48), generator=torch.Generator().manual_seed(1))


def gradient(student: Student, ids: Tensor) -> Tensor:
    """Return the gradient of a weighted sum of all hidden states with respect to the embedded tokens."""
    embedded = student.embeddings[ids].requires_grad_()
    hidden = student.model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    (found,) = torch.autograd.grad((hidden * weights).sum(), embedded)
    return found


@contextmanager
def noise_in_routers(student: Student, size: float) -> Iterator[list[int]]:
    """Change the routers' weights slightly in the backward pass, and count the routers' runs."""
    runs = [0]

    def move(module: nn.Module, original: Tensor) -> None:
        runs[0] += 1
        is_backward = torch._C._current_graph_task_id() != -1
        noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(7))
        module.weight.data.copy_(original + size * noise if is_backward else original)

    handles = [
        router.register_forward_pre_hook(lambda module, _, original=router.weight.data.clone(): move(module, original))
        for router in routers(student.model).values()
    ]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_the_gradient_is_that_without_recomputation(student: Student, ids: Tensor) -> None:
    expected = gradient(student, ids)
    with recomputed_layers(student.model) as watch, noise_in_routers(student, 0.0) as runs:
        assert torch.equal(gradient(student, ids), expected)
    assert watch.take() == 0
    assert runs[0] == 2 * len(routers(student.model))
    assert not student.model.training


def test_experts_picked_first_are_used_again_though_recomputation_would_pick_others(
    student: Student, ids: Tensor
) -> None:
    # Near ties everywhere: the noise changes which experts are picked, but hardly changes their weights.
    for router in routers(student.model).values():
        router.weight.data.mul_(0.01)
    expected = gradient(student, ids)
    with recomputed_layers(student.model) as watch, noise_in_routers(student, 0.002):
        found = gradient(student, ids)
        with pytest.raises(DataError, match="would not be picked in its recomputation"):
            watch.take()
        assert watch.take() == 0
    assert relative(found, expected) < 0.01
    with recomputed_layers(student.model), noise_in_routers(student, 0.002):
        for layer in student.model.get_decoder().layers:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        assert relative(gradient(student, ids), expected) > 10 * relative(found, expected)


@pytest.mark.parametrize("tile_tokens", [1, 7, 16, 48, 100])
@pytest.mark.parametrize("recomputes", [False, True])
def test_tiles_change_nothing(student: Student, ids: Tensor, recomputes: bool, tile_tokens: int) -> None:
    expected, names = gradient(student, ids), list(student.model.state_dict())
    watch = RoutingWatch()
    layers = recomputed_layers(student.model) if recomputes else nullcontext(watch)
    with layers as watch, tiled_experts(student.model, tile_tokens=tile_tokens, watch=watch):
        assert relative(gradient(student, ids), expected) < 1e-5
    assert watch.take() == 0
    assert list(student.model.state_dict()) == names
    assert not any("forward" in vars(module) for module in student.model.modules())


def test_recomputation_keeps_layer_inputs_alone(student: Student, ids: Tensor) -> None:
    def kept() -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        embedded = student.embeddings[ids].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            student.model.get_decoder()(inputs_embeds=embedded, use_cache=False)
        return sum(sizes.values())

    whole = kept()
    with recomputed_layers(student.model):
        assert kept() < whole / 20
