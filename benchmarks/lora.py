"""Compare a frozen linear layer with an injected adapter, forward and backward, with PEFT's layer and the bare one.

    python benchmarks/lora.py [--device cuda] [--tokens 2048] [--dtype float32,bfloat16] [--json]

The layers are those that an adapter changes in the 80B student, one of each shape; a variant's total counts each shape
as often as it occurs in the student. Variants alternate, one pass each over all tokens, and ratios are medians of the
rounds.

    frozen                    the layer alone: the lower bound
    ours                      `HookBasedLoRAInjector`
    ours, 8 samples           the same number of tokens in 8 samples, with an adapter for each
    addmm hook                a forward hook that adds the delta with one `baddbmm`
    peft                      PEFT's `lora.Linear`, from `get_peft_model` with its defaults: factors in float32
    peft, bfloat16 factors    the same with `autocast_adapter_dtype=False`, if the layer is bfloat16

`delivered_delta` is the fraction of the exact float64 delta that is present in the output, by projection, where the
delta is 0.4 % of the weight; `error_over_delta` is the output's total error in units of the delta. Memory is the growth
of the peak in one pass, of the process (VmHWM) on a CPU and of the allocator on a GPU; it includes the output and all
gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hyperagent.model.adapter import LoRAPair
from hyperagent.model.lora import HookBasedLoRAInjector

SHAPES = {
    "q_proj": (2048, 8192, 12),
    "k_proj, v_proj": (2048, 512, 24),
    "in_proj_qkvz": (2048, 12288, 36),
    "o_proj, out_proj": (4096, 2048, 48),
}
"""Input features, output features, and number of such layers in the student."""
RANK, SCALE = 16, 2.0
DELTA = 4e-3
"""|scale B A| over |W|."""
SAMPLES = 8
ORACLE_TOKENS = 512
PEFT = ("peft", "peft, bfloat16 factors")


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer with its input and the gradient of its output."""

    layer: nn.Linear
    x: Tensor
    dy: Tensor
    a: Tensor
    b: Tensor

    def leaves(self, samples: int = 1) -> LoRAPair:
        return LoRAPair(*(f.expand(samples, -1, -1).clone().requires_grad_() for f in (self.a, self.b)))


def make_problem(kind: str, tokens: int, dtype: torch.dtype, device: str) -> Problem:
    inputs, outputs, _ = SHAPES[kind]
    new: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(outputs, inputs, **new).mul_(inputs**-0.5))
    a = torch.randn(RANK, inputs, **new) * inputs**-0.5
    b = torch.randn(outputs, RANK, **new)
    b *= DELTA * float(layer.weight.float().norm()) / float((SCALE * b @ a).norm())
    x = torch.randn(1, tokens, inputs, **new).to(dtype).requires_grad_()
    return Problem(layer, x, torch.randn(1, tokens, outputs, **new).to(dtype), a, b)


Layer = Callable[[Tensor], Tensor]


@contextmanager
def ours(problem: Problem, *, samples: int = 1) -> Iterator[Layer]:
    net = nn.Sequential(problem.layer)
    with HookBasedLoRAInjector(net, scale=SCALE).inject({"0": problem.leaves(samples)}):
        yield lambda x: net(x.view(samples, -1, x.shape[2])).view(1, x.shape[1], -1)


@contextmanager
def addmm_hook(problem: Problem) -> Iterator[Layer]:
    pair = problem.leaves()

    def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = torch.bmm(inputs[0], pair.a.to(output.dtype).transpose(1, 2))
        return torch.baddbmm(output, low, pair.b.to(output.dtype).transpose(1, 2), alpha=SCALE)

    handle = problem.layer.register_forward_hook(add)
    try:
        yield problem.layer
    finally:
        handle.remove()


@contextmanager
def peft(problem: Problem, *, autocast_adapter_dtype: bool = True) -> Iterator[Layer]:
    config = LoraConfig(r=RANK, lora_alpha=round(SCALE * RANK), target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(problem.layer), config, autocast_adapter_dtype=autocast_adapter_dtype)
    adapter = model.base_model.model[0]
    with torch.no_grad():
        adapter.lora_A["default"].weight.copy_(problem.a)
        adapter.lora_B["default"].weight.copy_(problem.b)
    yield model


VARIANTS: dict[str, Callable[[Problem], Any]] = {
    "frozen": lambda problem: nullcontext(problem.layer),
    "ours": ours,
    "ours, 8 samples": partial(ours, samples=SAMPLES),
    "addmm hook": addmm_hook,
    "peft": peft,
    "peft, bfloat16 factors": partial(peft, autocast_adapter_dtype=False),
}


def one_pass(problem: Problem, layer: Layer) -> tuple[float, float]:
    """Return the seconds of the forward and of the backward pass."""
    synchronize = torch.cuda.synchronize if problem.x.is_cuda else lambda: None
    problem.x.grad = None
    synchronize()
    started = time.perf_counter()
    y = layer(problem.x)
    synchronize()
    between = time.perf_counter()
    y.backward(problem.dy)
    synchronize()
    return between - started, time.perf_counter() - between


def peak_extra_bytes(problem: Problem, layer: Layer) -> int:
    problem.x.grad = None
    if problem.x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_pass(problem, layer)
        return torch.cuda.max_memory_allocated() - before
    # Return freed memory to the system first; proc_pid_clear_refs(5): 5 resets the peak to what is resident.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    one_pass(problem, layer)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def sums_of_errors(problem: Problem, layer: Layer) -> Tensor:
    """Return <y - exact base, delta>, |delta|^2 and |y - exact base - delta|^2 over the first tokens, shape [3]."""
    x = problem.x.detach()[:, :ORACLE_TOKENS]
    with torch.no_grad():
        y = layer(x)[0].double()
        x64 = x[0].double()
        base = x64 @ problem.layer.weight.double().T
        delta = SCALE * (x64 @ problem.a.double().T) @ problem.b.double().T
    moved = y - base
    return torch.stack([(moved * delta).sum(), delta.square().sum(), (moved - delta).square().sum()]).cpu()


def compare(dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Compare all variants in one dtype."""
    names = [name for name in VARIANTS if dtype == torch.bfloat16 or name != "peft, bfloat16 factors"]
    seconds = {name: [0.0] * options.turns for name in names}
    errors = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    layers: dict[str, dict[str, Any]] = {}
    for kind, (_, _, count) in SHAPES.items():
        problem = make_problem(kind, options.tokens, dtype, options.device)
        passes: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        peaks = {}
        for turn in range(-1, options.turns):
            for name in names:
                with VARIANTS[name](problem) as layer:
                    # The first round warms up, and measures everything that is not a time.
                    if turn < 0:
                        one_pass(problem, layer)
                        peaks[name] = peak_extra_bytes(problem, layer)
                        errors[name] += sums_of_errors(problem, layer)
                    else:
                        passes[name].append(one_pass(problem, layer))
                        seconds[name][turn] += count * sum(passes[name][-1])
        layers[kind] = {
            name: {
                "forward_seconds": statistics.median(forward for forward, _ in passes[name]),
                "backward_seconds": statistics.median(backward for _, backward in passes[name]),
                "peak_extra_bytes": peaks[name],
            }
            for name in names
        }
    fastest_peft = min((name for name in names if name in PEFT), key=lambda name: statistics.median(seconds[name]))
    return {
        "ours_over_peft_time": _ratio(seconds["ours"], seconds[fastest_peft]),
        "ours_over_frozen_time": _ratio(seconds["ours"], seconds["frozen"]),
        "ours_over_peft_peak_bytes": max(
            rows["ours"]["peak_extra_bytes"] / min(rows[name]["peak_extra_bytes"] for name in names if name in PEFT)
            for rows in layers.values()
        ),
        "fastest_peft": fastest_peft,
        "variants": {
            name: {
                "seconds": statistics.median(seconds[name]),
                "over_frozen": _ratio(seconds[name], seconds["frozen"]),
                "delivered_delta": float(errors[name][0] / errors[name][1]),
                "error_over_delta": math.sqrt(float(errors[name][2] / errors[name][1])),
            }
            for name in names
        },
        "layers": layers,
    }


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results to print."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return {"device": "cuda", "results": "not yet measured"}
    by_dtype = {dtype: compare(getattr(torch, dtype), options) for dtype in options.dtype.split(",")}
    device = torch.cuda.get_device_name() if options.device == "cuda" else _cpu_name()
    return {
        "machine": {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "tokens": options.tokens,
        "rank": RANK,
        "turns": options.turns,
        "results": by_dtype,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _print_tables(found: dict[str, Any]) -> None:
    if found["results"] == "not yet measured":
        print("cuda: not yet measured")
        return
    print(f"{found['machine']}, torch {found['torch']}, {found['tokens']} tokens, rank {found['rank']}")
    for dtype, result in found["results"].items():
        print(f"{dtype}: ours over PEFT {result['ours_over_peft_time']:.3f}")
        for name, row in result["variants"].items():
            peak = max(rows[name]["peak_extra_bytes"] for rows in result["layers"].values()) / 1e6
            print(
                f"  {name:24} {row['seconds']:8.3f} s {row['over_frozen']:6.3f} x frozen {peak:8.1f} MB at most, "
                f"delta {row['delivered_delta']:.4f}, error {row['error_over_delta']:.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, help="by default 2,048 on a CPU and 131,072 on a GPU")
    parser.add_argument("--dtype", default="float32,bfloat16", help="comma-separated list")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.tokens, options.dtype, options.turns = 64, "float32", 1
    options.tokens = options.tokens or (131_072 if options.device == "cuda" else 2048)
    found = report(options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_tables(found)


if __name__ == "__main__":
    main()
