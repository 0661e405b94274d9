"""Compare the fused loss, forward and gradient, with the matrix products that bound it and with other implementations.

    python benchmarks/loss.py [--device cuda] [--rows 2048] [--dtype float32] [--json]

Each variant runs in a separate process; time and memory are those of one pass over all rows, after a warm-up on a few
rows. `floor` (hidden states times head, and a gradient of the logits times head) is the fastest of several divisions
into chunks of rows and slabs of ids. `floor` and `ours` alternate, and `ours_over_gemm_floor` is the median of their
ratios.

    ours                 `compute_distillation_loss` as training calls it; on a GPU also each of its two paths
    naive                all logits at once, log_softmax, gather, autograd
    chunks of 1,024      the same in chunks of 1,024 rows, whose log-softmax autograd keeps until the backward pass
    liger chunked        Liger-Kernel's LigerFusedLinearJSDLoss, compiled, as forward KL over the whole vocabulary; it
                         always computes a gradient of the head too
    liger fused          Liger-Kernel's fused linear JSD in Triton
    trl                  TRL's ChunkedDivergenceFunction, forward KL over the whole vocabulary

The last three need the teacher's logits; their teacher has hidden size 64, which costs them little. Memory is the
growth of the peak, of the process (VmHWM) on a CPU and of the allocator on a GPU; the gradient of the hidden states,
which every variant returns, is not counted. `ours_peak_extra_bytes` is the maximum of the given number of rows and four
times as many.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.loss.distillation import compute_distillation_loss

FLOOR_CUTS = ((160, 4096), (1024, 4096), (1024, None), (4096, None))
WARM_UP_ROWS = 8
# The loss is compiled for the shape of its chunks, so the warm-up must have the same shape.
LIGER_CHUNK = 1024
TEACHER_HIDDEN = 64


@dataclass(frozen=True, eq=False)
class Problem:
    """Hidden states and head of a student, and rows of a teacher."""

    hidden: Tensor
    head: Tensor
    rows: TeacherRows

    def first(self, n: int) -> Problem:
        hidden = self.hidden.detach()[:n].requires_grad_()
        return Problem(hidden, self.head, self.rows[:n])


def make_problem(options: argparse.Namespace) -> Problem:
    generator = torch.Generator(options.device).manual_seed(0)
    new = {"generator": generator, "device": options.device}
    dtype = getattr(torch, options.dtype)
    head = torch.empty(options.vocab, options.hidden, dtype=dtype, device=options.device)
    for start in range(0, options.vocab, 8192):
        block = head[start : start + 8192]
        block.copy_(torch.randn(block.shape, **new).mul_(options.hidden**-0.5))
    hidden = torch.randn(options.rows, options.hidden, **new).to(dtype).requires_grad_()
    # Ids are distinct within a row and scattered over the vocabulary.
    first = torch.randint(options.vocab, (options.rows, 1), **new)
    ids = (
        first + torch.arange(options.top_k, device=options.device) * (options.vocab // options.top_k)
    ) % options.vocab
    kept = torch.rand(options.rows, options.top_k, **new)
    logprobs = (0.95 * kept / kept.sum(1, keepdim=True)).log()
    tail = torch.full((options.rows,), 0.05, device=options.device).log()
    return Problem(hidden, head, TeacherRows(ids, logprobs, tail))


def floor(problem: Problem, *, chunk: int, slab: int | None) -> None:
    """Run both products for every row, discarding the first's results; `slab` ids at a time, or all of them."""
    n, vocab = problem.hidden.shape[0], problem.head.shape[0]
    logits = problem.head.new_empty(min(chunk, n), vocab)
    gradient = torch.zeros_like(problem.hidden)
    slabs = [slice(start, start + (slab or vocab)) for start in range(0, vocab, slab or vocab)]
    with torch.no_grad():
        for start in range(0, n, chunk):
            block = problem.hidden[start : start + chunk]
            for ids in slabs:
                torch.mm(block, problem.head[ids].T, out=logits[: len(block), ids])
            for ids in slabs:
                gradient[start : start + chunk].addmm_(logits[: len(block), ids], problem.head[ids])


def ours(problem: Problem, *, backend: Any) -> None:
    compute_distillation_loss(
        problem.hidden, problem.head, problem.rows, vocab_size=problem.head.shape[0], backend=backend
    ).backward()


def naive(problem: Problem, *, chunk: int | None = None) -> None:
    total = torch.zeros((), device=problem.hidden.device)
    for start in range(0, problem.hidden.shape[0], chunk or problem.hidden.shape[0]):
        rows = slice(start, start + (chunk or problem.hidden.shape[0]))
        logq = (problem.hidden[rows] @ problem.head.T).float().log_softmax(-1)
        logq_kept = logq.gather(1, problem.rows.ids_NK[rows])
        logq_rest = logq.scatter(1, problem.rows.ids_NK[rows], -torch.inf).logsumexp(-1)
        logp, logp_rest = problem.rows.logprobs_NK[rows], problem.rows.tail_logmass_N[rows]
        total = total + (logp.exp() * (logp - logq_kept)).sum() + (logp_rest.exp() * (logp_rest - logq_rest)).sum()
    total.backward()


def _teacher(problem: Problem) -> tuple[Tensor, Tensor]:
    new: dict[str, Any] = {"dtype": problem.head.dtype, "device": problem.head.device}
    hidden = torch.randn(problem.hidden.shape[0], TEACHER_HIDDEN, **new)
    return hidden, torch.randn(problem.head.shape[0], TEACHER_HIDDEN, **new)


def liger_chunked(problem: Problem) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, chunk_size=LIGER_CHUNK)
    loss(problem.hidden, problem.head, *_teacher(problem), problem.rows.ids_NK[:, 0]).backward()


def liger_fused(problem: Problem) -> None:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    LigerFusedLinearJSDFunction.apply(problem.hidden, problem.head, *_teacher(problem), None, 0.0).backward()


def trl(problem: Problem) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, head = _teacher(problem)
    loss, _ = ChunkedDivergenceFunction.apply(problem.hidden, problem.head, None, hidden, head, None, 0.0)
    loss.sum().backward()


VARIANTS: dict[str, Callable[[Problem], None]] = {
    **{f"floor {c} x {s or 'all'}": partial(floor, chunk=c, slab=s) for c, s in FLOOR_CUTS},
    "ours": partial(ours, backend="auto"),
    "ours, torch": partial(ours, backend="torch"),
    "ours, triton": partial(ours, backend="triton"),
    "naive": naive,
    "chunks of 1,024": partial(naive, chunk=1024),
    "liger chunked": liger_chunked,
    "liger fused": liger_fused,
    "trl": trl,
}
FLOORS = [name for name in VARIANTS if name.startswith("floor")]
ONLY_ON_A_GPU = ("ours, torch", "ours, triton")


def _peak_extra_bytes(device: str) -> Callable[[], int]:
    """Begin to measure memory; the returned function gives the growth of the peak since then, in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - before
    # Man page proc_pid_clear_refs(5): 5 resets the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    return lambda: _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one pass of one variant over all rows, in this process."""
    problem = make_problem(options)
    try:
        VARIANTS[name](problem.first(LIGER_CHUNK if name == "liger chunked" else WARM_UP_ROWS))
        peak = _peak_extra_bytes(options.device)
        started = time.perf_counter()
        VARIANTS[name](problem)
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    except ImportError as error:
        return {"not_run": f"not installed: {error}"}
    except RuntimeError as error:
        return {"not_run": f"does not run on this device: {type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    gradient = problem.hidden.numel() * problem.hidden.element_size()
    return {"seconds": seconds, "peak_extra_bytes": max(0, peak() - gradient)}


def in_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run `measure` in a separate process, which the system may kill if memory runs out."""
    shape = [f"--{k}={getattr(options, k.replace('-', '_'))}" for k in ("rows", "vocab", "hidden", "top-k", "device")]
    command = [sys.executable, __file__, "--variant", name, "--dtype", options.dtype, *shape]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"not_run": f"ended with exit status {done.returncode}: {last[:160]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Compare all variants in one dtype."""
    floors = {name: in_process(name, options) for name in FLOORS}
    best = min((f for f in floors if "seconds" in floors[f]), key=lambda f: floors[f]["seconds"])
    floor_s, ours_s, ours_bytes = [], [], []
    for _ in range(options.turns):
        own = in_process("ours", options)
        if "seconds" not in own:
            raise SystemExit(f"ours failed: {own}")
        ours_s.append(own["seconds"])
        ours_bytes.append(own["peak_extra_bytes"])
        floor_s.append(in_process(best, options)["seconds"])
    longer = in_process("ours", argparse.Namespace(**{**vars(options), "rows": 4 * options.rows}))
    skipped = {*FLOORS, "ours", *(() if options.device == "cuda" else ONLY_ON_A_GPU)}
    peers = {name: in_process(name, options) for name in VARIANTS if name not in skipped}
    return {
        "ours_over_gemm_floor": statistics.median(a / b for a, b in zip(ours_s, floor_s, strict=True)),
        "ours_peak_extra_bytes": max(*ours_bytes, longer.get("peak_extra_bytes", 0)),
        "floor_seconds_by_turn": floor_s,
        "ours_seconds_by_turn": ours_s,
        "variants": {
            **floors,
            "ours": {"seconds": statistics.median(ours_s), "peak_extra_bytes": max(ours_bytes)},
            "ours, rows x 4": longer,
            **peers,
        },
    }


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results to print for all dtypes; the headline numbers of the first are repeated at the top."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return {"device": "cuda", "results": "not yet measured"}
    by_dtype = {}
    for dtype in options.dtype.split(","):
        by_dtype[dtype] = compare(argparse.Namespace(**{**vars(options), "dtype": dtype}))
    first = next(iter(by_dtype.values()))
    device = torch.cuda.get_device_name() if options.device == "cuda" else _cpu_name()
    return {
        "ours_over_gemm_floor": first["ours_over_gemm_floor"],
        "ours_peak_extra_bytes": first["ours_peak_extra_bytes"],
        "machine": {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("rows", "vocab", "hidden", "top_k", "turns")},
        "results": by_dtype,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _print_table(found: dict[str, Any]) -> None:
    if found["results"] == "not yet measured":
        print("cuda: not yet measured")
        return
    print(f"{found['machine']}, torch {found['torch']}, {found['rows']} rows, vocabulary {found['vocab']}")
    for dtype, result in found["results"].items():
        best = min(result["variants"][name]["seconds"] for name in FLOORS if "seconds" in result["variants"][name])
        print(f"{dtype}: ours over the floor {result['ours_over_gemm_floor']:.3f}")
        for name, row in result["variants"].items():
            if "seconds" in row:
                peak = row["peak_extra_bytes"] / 1e6
                print(f"  {name:16} {row['seconds']:8.3f} s {row['seconds'] / best:6.2f} x floor {peak:9.1f} MB")
            else:
                print(f"  {name:16} {row['not_run']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, help="by default 2,048 on a CPU and 131,072 on a GPU")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--dtype", help="comma-separated list; by default float32,bfloat16, on a GPU bfloat16,float32")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.vocab, options.hidden, options.top_k = 64, 1000, 32, 8
        options.dtype, options.turns = "float32", 1
    on_gpu = options.device == "cuda"
    options.rows = options.rows or (131_072 if on_gpu else 2048)
    options.dtype = options.dtype or ("bfloat16,float32" if on_gpu else "float32,bfloat16")
    if options.variant:
        print(json.dumps(measure(options.variant, options)))
        return
    found = report(options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_table(found)


if __name__ == "__main__":
    main()
