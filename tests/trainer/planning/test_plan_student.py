"""Test the plan's numbers for the student against real layers: what autograd keeps, and the products torch counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from saved_tensors import saved_bytes
from tiny_student import real_config, tiny_config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next

from hyperagent.data.reports.plan import QWEN3_CODER_NEXT
from hyperagent.flops import FROZEN, ModelShape
from hyperagent.model.adapter import LoRAPair
from hyperagent.model.lora import HookBasedLoRAInjector
from hyperagent.model.targets import ARCHITECTURES, discover_target_layers
from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss.distillation import compute_distillation_loss
from hyperagent_trainer.planning.student_memory import block_bytes, mixer_bytes

DENSE = {
    "vocab_size": 64, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip


def of_one_layer(kind: str) -> Qwen3NextConfig:
    """Return the config of one layer of the 80B student with fewer experts, but as many per token."""
    real = real_config().to_dict()
    fewer = {"vocab_size": 64, "num_hidden_layers": 1, "layer_types": [kind], "num_experts": 16}
    return Qwen3NextConfig(**{**real, **fewer})


class ConvolutionKernel(torch.autograd.Function):
    """Keeps for its backward pass what causal-conv1d's kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()


class DeltaRuleKernel(torch.autograd.Function):
    """Keeps what fla's kernel does (`ChunkGatedDeltaRuleFunction`): normalized queries and keys, values, gates, A."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(q.clone(), k.clone(), v, g, beta, v.new_empty(*v.shape[:3], 64))
        return v.clone()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        of_one_layer("linear_attention"),
        of_one_layer("full_attention"),
        Qwen3Config(**DENSE),
        LlamaConfig(**DENSE),
    ],
    ids=["delta_net", "gated_attention", "qwen3", "llama"],
)
def test_autograd_keeps_of_a_layer_what_is_stated(
    config: PreTrainedConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_qwen3_next, "causal_conv1d_fn", lambda x, *_, **__: ConvolutionKernel.apply(x))
    monkeypatch.setattr(
        modeling_qwen3_next,
        "torch_chunk_gated_delta_rule",
        lambda q, k, v, g, beta, **_: (DeltaRuleKernel.apply(q, k, v, g, beta), None),
    )
    element, kind = dtype.itemsize, (getattr(config, "layer_types", None) or ["full_attention"])[0]
    stated = mixer_bytes(config, kind, element=element, kernels=True) + block_bytes(config, element=element)
    assert stated == pytest.approx(kept_per_token(config, dtype), rel=0.05)


def test_the_reference_of_the_delta_rule_keeps_what_is_stated() -> None:
    """The reference is what a CPU runs, so the test uses float32."""
    config = of_one_layer("linear_attention")
    stated = mixer_bytes(config, "linear_attention", element=4, kernels=False) + block_bytes(config, element=4)
    assert stated == pytest.approx(kept_per_token(config, torch.float32), rel=0.05)


def kept_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> float:
    """Return the bytes per token that autograd keeps for one adapted layer."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    layer = model.get_decoder().layers[0]
    targets = [path for path in ARCHITECTURES[config.model_type].targets if hasattr(layer, path.partition(".")[0])]
    pairs = {
        info.name: LoRAPair(
            torch.randn(1, 4, info.in_features, requires_grad=True),
            torch.randn(1, info.out_features, 4, requires_grad=True),
        )
        for info in discover_target_layers(model, targets)
    }

    def kept(num_tokens: int) -> int:
        x = torch.randn(1, num_tokens, config.hidden_size, dtype=dtype, requires_grad=True)
        with HookBasedLoRAInjector(model, scale=1.0).inject(pairs):
            return saved_bytes(lambda: model.get_decoder()(inputs_embeds=x, use_cache=False), model)

    # The decoder's last norm keeps its input in float32.
    return (kept(256) - kept(128)) / 128 - 4 * config.hidden_size


def products_of(forward_and_backward: Callable[[], object]) -> int:
    """Return the operations that torch counts, including two kinds of product that its counter does not know."""

    def solve(a_shape: Sequence[int], b_shape: Sequence[int], *_: object, **__: object) -> int:
        # A kernel multiplies by the inverse of a chunk's triangular system.
        return 2 * math.prod(b_shape) * a_shape[-1]

    def accumulate(_: object, a_shape: Sequence[int], b_shape: Sequence[int], *__: object, **___: object) -> int:
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    known = {torch.ops.aten.linalg_solve_triangular: solve, torch.ops.aten.addmm_: accumulate}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        forward_and_backward()
    return counter.get_total_flops()


def shape_of(config: PreTrainedConfig) -> ModelShape:
    with torch.device("meta"):
        return ModelShape.of(AutoModelForCausalLM.from_config(config).get_decoder(), config)


def test_the_80b_students_shape_is_the_one_that_data_is_planned_with() -> None:
    found = shape_of(real_config())
    assert found.linear_parameters == pytest.approx(QWEN3_CODER_NEXT.linear_parameters, rel=1e-3)
    assert found.num_parameters == 79_674_391_296
    for field in ("attention_width", "num_attention_layers", "head_parameters", "recurrent_flops"):
        assert getattr(found, field) == getattr(QWEN3_CODER_NEXT, field)


@pytest.mark.parametrize("num_tokens", [128, 384])
def test_a_frozen_students_products_are_those_that_torch_counts(num_tokens: int) -> None:
    """The student is a tiny Qwen3-Next; its eager attention computes every pair, twice as many as needed."""
    config = tiny_config(attn_implementation="eager", experts_implementation="eager", num_experts=2)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    x = torch.randn(1, num_tokens, config.hidden_size, requires_grad=True)
    counted = products_of(
        lambda: model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
    )
    found = shape_of(config).training_flops(np.array([num_tokens]), np.array([0]), FROZEN)
    stated = found["linear"] + 2 * found["attention"] + found["recurrent"]
    assert stated.sum() == pytest.approx(counted, rel=0.02)


def test_the_losss_products_are_those_that_torch_counts() -> None:
    rows, size, vocab, kept = 96, 128, 4096, 8
    hidden = torch.randn(rows, size, requires_grad=True)
    ids = torch.randint(vocab, (rows, 1)) + torch.arange(kept)
    head, teacher = torch.randn(vocab + kept, size), torch.full((rows, kept), 0.1).log()
    tail = torch.full((rows,), 0.2).log()
    counted = products_of(
        lambda: compute_distillation_loss(
            hidden, head, TeacherRows(ids, teacher, tail), vocab_size=vocab + kept
        ).backward()
    )
    shape = ModelShape("head", 0, 0, 0, 0, head_parameters=size * (vocab + kept))
    stated = shape.training_flops(np.array([0]), np.array([rows]), FROZEN)["head"]
    # The kept ids' part of the gradient consists of separate products.
    assert stated.sum() == pytest.approx(counted, rel=0.02)
