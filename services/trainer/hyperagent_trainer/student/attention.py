"""Choose the kernel for the student's softmax attention by trying each one: at 131,072 tokens it is most of a step.

PyTorch picks among its kernels by rules that know neither the GPU model nor the version of cuDNN, and the fastest kernel at a
head size of 256 differs between them. Each candidate runs alone, forward and backward, through the function that the student's
layers call. A candidate that raises or gives wrong results is refused, and the fastest of the others is used. On a CPU PyTorch
has one fused kernel, and nothing is timed there.
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
# The package flash-attn (https://github.com/Dao-AILab/flash-attention) and the name that transformers gives it.
_PACKAGES: dict[AttentionName, str] = {"flash_attn": "flash_attention_2"}
NAMES: tuple[AttentionName, ...] = ("cudnn", "flash", "efficient", "flash_attn")
_SHORT_TOKENS = 256
_LONG_TOKENS = 16_384
_NUM_TIMED = 3
# Largest accepted error of output and gradients, relative to the largest value: a few roundings of the dtype, or of TF32
# for float32.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3}

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""Causal attention of the student's heads: maps q [1, H, T, D] and k, v [1, KV, T, D] to [1, T, H, D]."""


@dataclass(frozen=True)
class Attention:
    """The chosen kernel and the check that records why."""

    name: AttentionName | None
    """None for PyTorch's own choice: on a CPU, for a student without softmax attention, or where no candidate works."""
    check: Check
    """The pre-flight check with the result of every candidate."""

    @contextmanager
    def in_use(self, model: PreTrainedModel) -> Iterator[None]:
        """Make the student's layers use the kernel within the block, also when they are run again in the backward pass."""
        if self.name in _PACKAGES:
            before = model.config._attn_implementation
            model.set_attn_implementation(_PACKAGES[self.name])
            try:
                yield
            finally:
                model.set_attn_implementation(before)
        elif self.name is not None:
            # These settings are process-wide, so autograd's threads have them too. The other kernels follow because the
            # network computes in float32, which not every kernel supports.
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
    """Try the available kernels and choose one.

    Args:
        wanted: the kernel that must be used, or "auto".
        num_tokens: length of the longest trajectory.
        earlier: the kernel that the run used before. It is kept while it works: timings vary, but a resumed run must not.
    """
    layer = next((m for m in model.modules() if hasattr(m, "num_key_value_groups")), None)
    if layer is None:
        return _chosen(None, {"softmax attention": "none"}, passed=True)
    heads = _Heads.of(model)
    if device.type != "cuda":
        error = _error(_sdpa, layer, heads, device, dtype)
        measured: Measured = {
            "chosen": "PyTorch's" if wanted == "auto" else f"none, {wanted} is for GPUs",
            "relative error": error,
        }
        return _chosen(None, measured, passed=wanted == "auto" and error <= _TOLERANCE[dtype])
    candidates = {name: _alone(name) for name in _SDPA}
    if is_flash_attn_2_available():
        candidates |= {name: _package(name) for name in _PACKAGES}
    found = try_candidates(candidates, layer, heads, device, dtype, num_tokens=num_tokens)
    name = pick(found, wanted=wanted, earlier=earlier)
    results = {str(n): _describe_result(f) for n, f in found.items()}
    return _chosen(name, {"chosen": name or "none", **results}, passed=name is not None)


def pick(
    found: dict[AttentionName, float | str], *, wanted: AttentionName, earlier: AttentionName | None
) -> AttentionName | None:
    """Return the candidate to use, or None if the wanted one, or every one, was refused.

    Args:
        found: by candidate, milliseconds, or the reason why it was refused.
    """
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
    """Return, for each candidate, the milliseconds of a forward and a backward pass, or why it is refused."""
    found: dict[AttentionName, float | str] = {}
    for name, attend in candidates.items():
        try:
            error = _error(attend, layer, heads, device, dtype)
            if not error <= _TOLERANCE[dtype]:
                found[name] = f"off by {error:.2g} of the largest value"
                continue
            found[name] = _milliseconds(attend, layer, heads, device, dtype, min(num_tokens, _LONG_TOKENS))
        # A kernel that does not support a shape raises either of these; so does running out of memory.
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
        """Draw queries, keys and values, and a gradient of the output, without using the global random state."""
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
    """Return the largest error of output and gradients, each relative to its largest value, against float64 attention."""
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
    """Return the milliseconds of a forward and a backward pass on a GPU: the fastest of several runs."""
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
    """Return the first rank's choice on every rank.

    Args:
        choose: makes the choice; it gets the name that the first rank chose, or None.
    """
    own = choose(None) if ranks.is_first else None
    number = int(ranks.max(0 if own is None or own.name is None else 1 + NAMES.index(own.name)))
    return own or choose(NAMES[number - 1] if number else None)


def _describe_result(found: float | str) -> str:
    return f"refused: {found}" if isinstance(found, str) else f"{found:.1f} ms"


def _chosen(name: AttentionName | None, measured: Measured, *, passed: bool) -> Attention:
    check = Check(
        "attention",
        passed,
        measured,
        "a fused kernel whose output and gradients are those of float64",
        "without one, attention would store a number for every pair of tokens, or training would use wrong gradients; "
        "name another kernel in the recipe's `attention`, or install a PyTorch for this GPU",
    )
    return Attention(name, check)


def earlier_choice(report: Path) -> AttentionName | None:
    """Return the kernel that an earlier start of the run chose, read from its preflight.json, or None."""
    try:
        checks = json.loads(report.read_bytes())["checks"]
    except (OSError, ValueError, KeyError):
        return None
    chosen = next((check["measured"].get("chosen") for check in checks if check["name"] == "attention"), None)
    return next((name for name in NAMES if name == chosen), None)
