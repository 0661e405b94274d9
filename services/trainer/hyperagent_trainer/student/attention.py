"""Which kernel computes the student's softmax attention: found out by trying, since at 131,072 tokens it is most of a step.

PyTorch picks among its kernels by rules that know neither the card nor the version of cuDNN, and the one that is fastest at a
head size of 256 differs between them. Each candidate runs alone, forward and backward, through the function that the student's
layers call; what raises or is wrong is refused, and the fastest of the rest is taken. On a CPU PyTorch has one fused kernel, and
nothing is timed there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_flash_attn_2_available

from hyperagent.architecture import head_dim, num_key_value_heads
from hyperagent_trainer.config import AttentionName
from hyperagent_trainer.distributed import Ranks
from hyperagent_trainer.report import Check, Measured

_SDPA: dict[AttentionName, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# The package (https://github.com/Dao-AILab/flash-attention), by the name that transformers has for it.
_PACKAGES: dict[AttentionName, str] = {"flash_attn": "flash_attention_2"}
NAMES: tuple[AttentionName, ...] = ("cudnn", "flash", "efficient", "flash_attn")
_SHORT_TOKENS = 256
_LONG_TOKENS = 16_384
_NUM_TIMED = 3
# Largest error of output and gradients over the largest value: some roundings of the dtype, or of TF32 for float32.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3}

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""Causal attention of the student's heads: q [1, H, T, D], k and v [1, KV, T, D] to [1, T, H, D]."""


@dataclass(frozen=True)
class Attention:
    """What was chosen, and why."""

    name: AttentionName | None
    """None for PyTorch's own choice: on a CPU, for a student without softmax attention, or where nothing works."""
    check: Check

    @contextmanager
    def in_use(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, the student's layers use it, also those that are run again in the backward pass."""
        if self.name in _PACKAGES:
            before = model.config._attn_implementation
            model.set_attn_implementation(_PACKAGES[self.name])
            try:
                yield
            finally:
                model.set_attn_implementation(before)
        elif self.name is not None:
            # These settings are the process's, so that autograd's threads have them too. The others follow for the
            # network, whose float32 not every kernel takes.
            others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            with sdpa_kernel([_SDPA[self.name], *others], set_priority=True):
                yield
        else:
            yield


def choose_attention(
    model: PreTrainedModel,
    *,
    wanted: AttentionName,
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    earlier: AttentionName | None,
) -> Attention:
    """Try what there is.

    Args:
        wanted: a candidate to be taken, or "auto".
        num_tokens: of the longest trajectory.
        earlier: what the run has used before, and goes on with while it works; timings vary, and a resumed run must not.
    """
    layer = next((m for m in model.modules() if hasattr(m, "num_key_value_groups")), None)
    if layer is None:
        return _chosen(None, {"softmax attention": "none"}, passed=True)
    heads = _Heads.of(model)
    if device.type != "cuda":
        error = _error(_sdpa, layer, heads, device, dtype)
        told: Measured = {
            "chosen": "PyTorch's" if wanted == "auto" else f"none, {wanted} is for GPUs",
            "relative error": error,
        }
        return _chosen(None, told, passed=wanted == "auto" and error <= _TOLERANCE[dtype])
    candidates = {name: _alone(name) for name in _SDPA}
    if is_flash_attn_2_available():
        candidates |= {name: _package(name) for name in _PACKAGES}
    found = try_candidates(candidates, layer, heads, device, dtype, num_tokens=num_tokens)
    name = pick(found, wanted=wanted, earlier=earlier)
    return _chosen(name, {"chosen": name or "none", **{n: _told(f) for n, f in found.items()}}, passed=name is not None)


def pick(
    found: dict[AttentionName, float | str], *, wanted: AttentionName, earlier: AttentionName | None
) -> AttentionName | None:
    """The candidate to use, of milliseconds or reasons by name; None if what is wanted, or everything, was refused."""
    works = {name: time for name, time in found.items() if not isinstance(time, str)}
    if wanted != "auto":
        return wanted if wanted in works else None
    if earlier in works:
        return earlier
    return min(works, key=works.__getitem__, default=None)


def try_candidates(
    candidates: dict[AttentionName, Attend],
    layer: nn.Module,
    heads: _Heads,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_tokens: int,
) -> dict[AttentionName, float | str]:
    """Milliseconds of a forward and a backward pass of each, or why it is refused."""
    found: dict[AttentionName, float | str] = {}
    for name, attend in candidates.items():
        try:
            error = _error(attend, layer, heads, device, dtype)
            if not error <= _TOLERANCE[dtype]:
                found[name] = f"off by {error:.2g} of the largest value"
                continue
            found[name] = _milliseconds(attend, layer, heads, device, dtype, min(num_tokens, _LONG_TOKENS))
        # A kernel that cannot do a shape says so with either of these, out of memory among them.
        except (RuntimeError, ValueError) as refusal:
            found[name] = str(refusal).strip().split("\n")[0][:200]
    return found


@dataclass(frozen=True)
class _Heads:
    num: int
    num_kv: int
    size: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Heads:
        config = model.config.get_text_config()
        return cls(config.num_attention_heads, num_key_value_heads(config), head_dim(config))

    def draw(self, num_tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """Queries, keys and values, and a gradient of the output; no global random state is used."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, n, num_tokens, self.size) for n in (self.num, self.num_kv, self.num_kv)]
        shapes.append((1, num_tokens, self.num, self.size))
        *inputs, gradient = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        return [x.requires_grad_() for x in inputs], gradient


def _sdpa(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scaling = query.shape[-1] ** -0.5
    return ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, None, scaling=scaling, is_causal=True)[0]


def _alone(name: AttentionName) -> Attend:
    def attend(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(_SDPA[name]):
            return _sdpa(layer, query, key, value)

    return attend


def _package(name: AttentionName) -> Attend:
    function = ALL_ATTENTION_FUNCTIONS[_PACKAGES[name]]

    def attend(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(layer, query, key, value, None, scaling=query.shape[-1] ** -0.5, is_causal=True)[0]

    return attend


def _error(attend: Attend, layer: nn.Module, heads: _Heads, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of output and gradients, over the largest value of each, against attention written out in float64."""
    inputs, gradient = heads.draw(_SHORT_TOKENS, device, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    query, key, value = exact
    repeats = heads.num // heads.num_kv
    scores = query @ key.repeat_interleave(repeats, 1).mT / math.sqrt(heads.size)
    causal = torch.ones(_SHORT_TOKENS, _SHORT_TOKENS, dtype=torch.bool, device=device).tril()
    weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2)
    output = attend(layer, *inputs)
    found = [output, *torch.autograd.grad(output, inputs, gradient)]
    wanted = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    return max(
        float((f.double() - w).detach().abs().max() / w.detach().abs().max())
        for f, w in zip(found, wanted, strict=True)
    )


def _milliseconds(
    attend: Attend, layer: nn.Module, heads: _Heads, device: torch.device, dtype: torch.dtype, num_tokens: int
) -> float:
    """Of a forward and a backward pass on a GPU, the fastest of a few."""
    inputs, gradient = heads.draw(num_tokens, device, dtype)
    times: list[float] = []
    for _ in range(1 + _NUM_TIMED):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.autograd.grad(attend(layer, *inputs), inputs, gradient)
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return min(times[1:])  # the first one also loads the kernel


def agreed(choose: Callable[[AttentionName | None], Attention], ranks: Ranks) -> Attention:
    """The first rank's choice, on every rank; `choose` is told what it has to be, or None."""
    own = choose(None) if ranks.is_first else None
    number = int(ranks.max(0 if own is None or own.name is None else 1 + NAMES.index(own.name)))
    return own or choose(NAMES[number - 1] if number else None)


def _told(found: float | str) -> str:
    return f"refused: {found}" if isinstance(found, str) else f"{found:.1f} ms"


def _chosen(name: AttentionName | None, measured: Measured, *, passed: bool) -> Attention:
    check = Check(
        "attention",
        passed,
        measured,
        "a fused kernel whose output and gradients are those of float64",
        "without one, attention would hold a number for every pair of tokens, or train on wrong gradients; "
        "name another in the recipe's `attention`, or install a PyTorch for this GPU",
    )
    return Attention(name, check)


def earlier_choice(report: Path) -> AttentionName | None:
    """What an earlier start of the run has chosen, from its preflight.json, if there is one."""
    try:
        checks = json.loads(report.read_bytes())["checks"]
    except (OSError, ValueError, KeyError):
        return None
    chosen = next((check["measured"].get("chosen") for check in checks if check["name"] == "attention"), None)
    return next((name for name in NAMES if name == chosen), None)
