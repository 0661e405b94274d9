"""Test the choice among attention kernels, with the one of the GPU's three that a CPU has, and with wrong ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import StopAfter, run
from torch import Tensor, nn
from torch.nn.attention import _cur_sdpa_kernel_backends
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from hyperagent.errors import ConfigError
from hyperagent_trainer.config import AttentionName, TrainRecipe
from hyperagent_trainer.report import Check
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.student import attention, student
from hyperagent_trainer.student.attention import (
    Attention,
    agreed,
    choose_attention,
    earlier_choice,
    pick,
    try_candidates,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(student_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)


def choose(model: Any, wanted: AttentionName = "auto") -> Attention:
    return choose_attention(model, wanted=wanted, device=CPU, dtype=torch.float32, num_tokens=500, earlier=None)


def test_a_cpus_own_kernel_is_held_against_float64(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose(model)
    assert (found.name, found.check.passed) == (None, True)
    assert 0 < float(found.check.measured["relative error"]) < 1e-5

    def not_causal(*args: Any, **kwargs: Any) -> Tensor:
        return scaled_dot_product_attention(*args, **{**kwargs, "is_causal": False})

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", not_causal)
    wrong = choose(model)
    assert not wrong.check.passed
    assert float(wrong.check.measured["relative error"]) > 0.1


def test_what_raises_or_is_wrong_is_refused_and_the_fastest_of_the_rest_is_taken(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention._alone("flash")

    def wrong_gradient(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return right(layer, query, key.detach() + 0 * key, value)

    candidates: dict[AttentionName, Callable[..., Tensor]] = {
        "cudnn": attention._alone("cudnn"),
        "flash": right,
        "efficient": wrong_gradient,
        "flash_attn": right,
    }
    times = iter([3.0, 2.0])
    monkeypatch.setattr(attention, "_milliseconds", lambda *_: next(times))
    layer = next(m for m in model.modules() if hasattr(m, "num_key_value_groups"))
    heads = attention._Heads.of(model)
    found = try_candidates(candidates, layer, heads, CPU, torch.float32, num_tokens=500)
    assert "No viable backend" in str(found["cudnn"])
    assert "off by 1 of the largest value" in str(found["efficient"])
    assert (found["flash"], found["flash_attn"]) == (3.0, 2.0)
    assert pick(found, wanted="auto", earlier=None) == "flash_attn"
    assert pick(found, wanted="auto", earlier="flash") == "flash", "a resumed run keeps its kernel"
    assert pick(found, wanted="auto", earlier="cudnn") == "flash_attn"
    assert pick(found, wanted="flash", earlier="flash_attn") == "flash"
    assert pick(found, wanted="cudnn", earlier=None) is None
    assert pick({}, wanted="auto", earlier=None) is None


def test_a_kernel_for_gpus_is_no_choice_on_a_cpu(recipe: TrainRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pre-flight check attention failed: found chosen none, cudnn is for GPUs"):
        run(recipe.model_copy(update={"attention": "cudnn"}), tmp_path / "run")


def test_what_was_chosen_is_found_again(recipe: TrainRecipe, tmp_path: Path) -> None:
    folder = run(recipe, tmp_path / "run", StopAfter(1))
    assert earlier_choice(folder.preflight) is None
    report = json.loads(folder.preflight.read_text())
    check = next(check for check in report["checks"] if check["name"] == "attention")
    assert check["passed"]
    check["measured"]["chosen"] = "efficient"
    folder.preflight.write_text(json.dumps(report))
    assert earlier_choice(folder.preflight) == "efficient"
    assert earlier_choice(RunFolder(tmp_path).preflight) is None


def test_the_choice_holds_for_layers_that_are_run_again(model: Any) -> None:
    ids = torch.arange(12)[None]
    seen: list[Any] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spied(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(_cur_sdpa_kernel_backends(with_priority=True)[0])
        return original(*args, **kwargs)

    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.nn.functional.scaled_dot_product_attention = spied
    try:
        with Attention("efficient", Check("attention", True, {}, "", "")).in_use(model):
            model(ids).logits.sum().backward()
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
        model.gradient_checkpointing_disable()
        model.eval().zero_grad()
    layers = sum(hasattr(m, "num_key_value_groups") for m in model.modules())
    assert seen == [attention._SDPA["efficient"]] * 2 * layers
    assert _cur_sdpa_kernel_backends(with_priority=True)[0] != attention._SDPA["efficient"]


@pytest.mark.parametrize("name", ["flash", None])
def test_all_ranks_take_what_the_first_has_chosen(name: AttentionName | None) -> None:
    made = Attention(name, Check("attention", True, {}, "", ""))
    required: list[AttentionName | None] = []
    said: list[int] = []

    class First:
        is_first = True

        def max(self, value: int) -> int:
            said.append(value)
            return value

    class Other:
        is_first = False

        def max(self, value: int) -> int:
            assert value == 0
            return said[0]

    def choose(name: AttentionName | None) -> Attention:
        required.append(name)
        return made

    assert agreed(choose, First()) is made  # type: ignore[arg-type]
    assert agreed(choose, Other()) is made  # type: ignore[arg-type]
    assert required == [None, name]


@pytest.mark.parametrize(
    ("is_installed", "why"),
    [(False, "not installed, or too old"), (True, "importing them fails with ModuleNotFoundError")],
)
def test_a_gpu_needs_the_kernels_of_gated_delta_net(
    model: Any, monkeypatch: pytest.MonkeyPatch, is_installed: bool, why: str
) -> None:
    student._require_kernels(model, CPU)
    monkeypatch.setattr(student, "is_flash_linear_attention_available", lambda: is_installed)
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    with pytest.raises(ConfigError, match=why):
        student._require_kernels(model, torch.device("cuda"))


@pytest.mark.parametrize("found", ["0.2.2", "0.4.2"])
def test_kernels_that_give_wrong_numbers_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(student, "version", lambda _: found)
    monkeypatch.setattr(student, "is_flash_linear_attention_available", lambda: True)
    with pytest.raises(
        ConfigError, match=rf"flash-linear-attention {found} knows no grouped value heads.*make setup-gpu"
    ):
        student._require_kernels(model, torch.device("cuda"))
