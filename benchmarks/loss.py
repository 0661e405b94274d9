"""The chunked sparse KL against plain PyTorch, and against the two matrix products that bound it.

    python benchmarks/loss.py [--rows 256] [--vocab 151936] [--hidden 2048] [--json]

`plain` is what one writes without a fused loss: all logits at once, log_softmax, gather, autograd. `bound` multiplies
hidden states by the head and a gradient of the logits by the head, and does nothing else. Every variant runs in a
process of its own, which also gives its peak memory; the time is the median of three after one warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from hyperagent_trainer.loss import compute_distillation_loss

VARIANTS = ("bound", "chunked 64", "chunked 256", "plain")
REPEATS = 3


def plain(hidden: Tensor, head: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    """The same loss with every logit in memory."""
    logq = (hidden @ head.T).log_softmax(-1)
    q_kept = logq.gather(1, ids)
    q_rest = logq.scatter(1, ids, -torch.inf).logsumexp(-1)
    return (logprobs.exp() * (logprobs - q_kept)).sum() + (tail.exp() * (tail - q_rest)).sum()


def step(variant: str, rows: int, vocab: int, size: int, top_k: int) -> tuple[float, float]:
    """Seconds and loss of one forward and backward pass."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(vocab, size, generator=generator).mul_(size**-0.5)
    hidden = torch.randn(rows, size, generator=generator).requires_grad_()
    # Distinct within a row and scattered over the vocabulary.
    first = torch.randint(vocab, (rows, 1), generator=generator)
    ids = (first + torch.arange(top_k) * (vocab // top_k)) % vocab
    kept = torch.rand(rows, top_k, generator=generator)
    logprobs = (0.95 * kept / kept.sum(1, keepdim=True)).log()
    tail = torch.full((rows,), 0.05).log()
    seconds = []
    loss = 0.0
    for _ in range(REPEATS + 1):
        hidden.grad = None
        started = time.perf_counter()
        if variant == "bound":
            with torch.no_grad():
                for start in range(0, rows, 256):
                    (hidden[start : start + 256] @ head.T) @ head
        elif variant == "plain":
            total = plain(hidden, head, ids, logprobs, tail)
            total.backward()
            loss = total.item()
        else:
            chunk = int(variant.split()[1])
            total = compute_distillation_loss(hidden, head, ids, logprobs, tail, vocab_size=vocab, chunk_rows=chunk)
            total.backward()
            loss = total.item()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.variant:
        seconds, loss = step(options.variant, options.rows, options.vocab, options.hidden, options.top_k)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"variant": options.variant, "seconds": seconds, "loss": loss, "peak_rss_bytes": peak}))
        return
    shape = ["--rows", options.rows, "--vocab", options.vocab, "--hidden", options.hidden, "--top-k", options.top_k]
    results = [
        json.loads(subprocess.check_output([sys.executable, __file__, "--variant", variant, *map(str, shape)]))
        for variant in VARIANTS
    ]
    bound = results[0]["seconds"]
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "rows": options.rows,
        "vocab": options.vocab,
        "hidden": options.hidden,
        "results": [{**result, "times_bound": result["seconds"] / bound} for result in results],
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['machine']}, torch {report['torch']}, {options.rows} rows, vocabulary {options.vocab}, float32")
    for result in report["results"]:
        memory = result["peak_rss_bytes"] / 2**30
        print(
            f"{result['variant']:12} {result['seconds']:7.2f} s {result['times_bound']:6.2f} x bound {memory:6.2f} GiB peak"
        )


if __name__ == "__main__":
    main()
