"""Measure the memory of a training step on one long trajectory, with recomputed layers and tiled experts.

    python benchmarks/long_trajectory.py [--tokens 16384 131072] [--plot FILE.png] [--json]

The student and the step are those of benchmarks/train.py: a tiny Qwen3-Next with 151,936 entries, a quarter of the
tokens supervised, the laptop recipe's hypernetwork. Each length runs in a separate process; `peak_rss_bytes` is that of
the whole process, libraries included, and the curve samples it every quarter of a second. On a CPU, transformers
computes Gated DeltaNet with a loop in PyTorch, which takes most of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train import HIDDEN, PROMPT_TOKENS, RECIPE, StudentWithoutFiles, make_batch, make_model, status_bytes
from transformers.utils import logging

from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.targets import discover_target_layers
from hyperagent_trainer.config import load_recipe
from hyperagent_trainer.network.adapted_student import AdaptedStudent
from hyperagent_trainer.student.activation_checkpoint import recomputation

_SAMPLE_S = 0.25


def measure(num_tokens: int, vocab: int) -> dict[str, Any]:
    """Run one step in this process."""
    recipe = load_recipe(RECIPE).model_copy(update={"checkpoint_activations": True})
    options = argparse.Namespace(tokens=num_tokens, vocab=vocab)
    student, batch = StudentWithoutFiles(make_model(options)), make_batch(options, 1)
    network = AgenticHyperNetwork(recipe.hypernetwork, discover_target_layers(student.model), HIDDEN)
    adapted = AdaptedStudent(student, network)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    prompts = [batch.token_ids_BT[0, :PROMPT_TOKENS].numpy().astype(np.uint32)]
    curve: list[tuple[float, int]] = []
    done = threading.Event()
    started = time.perf_counter()

    def sample() -> None:
        while not done.wait(_SAMPLE_S):
            curve.append((time.perf_counter() - started, status_bytes("VmRSS")))

    sampler = threading.Thread(target=sample)
    sampler.start()
    with recomputation(student.model, recipe):
        loss = adapted.backward(batch, adapted.adapters(prompts), recipe.loss, scale=1 / batch.num_rows)
        optimizer.step()
    seconds = time.perf_counter() - started
    done.set()
    sampler.join()
    assert loss.isfinite()
    return {"tokens": num_tokens, "seconds": seconds, "peak_rss_bytes": status_bytes("VmHWM"), "curve": curve}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for row in results:
        seconds, sizes = np.array(row["curve"]).T
        axes.plot(seconds / row["seconds"], sizes / 2**30, label=f"{row['tokens']:,} tokens, {row['seconds']:.0f} s")
    axes.axhline(8, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="share of the step", ylabel="resident memory, GiB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 32_768, 65_536, 131_072])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.tokens, options.vocab = [256, 512], 1000
    logging.set_verbosity_error()
    if options.out:
        options.out.write_text(json.dumps(measure(options.tokens[0], options.vocab)))
        return
    results = []
    for num_tokens in options.tokens:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            command = [
                sys.executable,
                __file__,
                "--tokens",
                str(num_tokens),
                "--vocab",
                str(options.vocab),
                "--out",
                str(out),
            ]
            subprocess.run(command, check=True)
            results.append(json.loads(out.read_text()))
    if options.plot:
        plot(results, options.plot)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if options.json:
        print(json.dumps({"machine": machine, "torch": torch.__version__, "results": results}, indent=2))
        return
    print(machine)
    for row in results:
        print(f"  {row['tokens']:7,} tokens {row['seconds']:7.1f} s {row['peak_rss_bytes'] / 2**30:6.2f} GiB")


if __name__ == "__main__":
    main()
