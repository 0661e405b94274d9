"""Simulate how busy the ranks are, with the trainer's steps and with steps of randomly drawn trajectories.

    python benchmarks/schedule.py [--tokens TOKENS.parquet] [--ranks 8] [--batch-size 8] [--json]

A rank's time is the predicted cost of its trajectories (services/trainer/hyperagent_trainer/data/cost.py, for the
48-layer student), a step's time is that of the slowest rank; the efficiency is the mean over the maximum, over all
steps of an epoch. Lengths are those of a tokens file, of 32,768 draws from them with replacement, and of two synthetic
splits of that size. A small split is divided into smaller groups so that batches differ between epochs, and is
therefore balanced less well.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
from generate import real_student

from hyperagent.data.files.tokens_file import TRAIN, read_tokens
from hyperagent_trainer.data.cost import StepCost
from hyperagent_trainer.data.schedule import batch_order, plan_step

LONGEST = 131_072


def student_cost() -> StepCost:
    model = real_student()
    return StepCost.of(model.get_decoder(), model.config)


def lengths_by_name(tokens: Path | None, count: int) -> dict[str, list[int]]:
    generator = np.random.default_rng(0)
    # Mean 45,000, standard deviation 0.8 times the mean.
    spread = np.sqrt(np.log(1 + 0.8**2))
    lognormal = generator.lognormal(np.log(45_000) - spread**2 / 2, spread, count).clip(1_000, LONGEST)
    found = {
        "lognormal, mean 45,000": lognormal.astype(int).tolist(),
        "uniform, 8,000 to 131,072": generator.integers(8_000, LONGEST, count).tolist(),
    }
    if tokens is not None:
        real = [len(t.student_ids) for t in read_tokens(tokens, split=TRAIN)]
        found = {tokens.name: real, f"drawn from {tokens.name}": generator.choice(real, count).tolist(), **found}
    return found


def efficiency(steps: list[list[int]], costs: list[float], num_ranks: int) -> float:
    """Return the efficiency over all steps together."""
    busy = slowest = 0.0
    for step in steps:
        plan = plan_step(step, costs, rank=0, num_ranks=num_ranks, size=1)
        total = sum(costs[i] for i in step)
        busy += total
        slowest += total / plan.efficiency
    return busy / slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--trajectories", type=int, default=32_768, help="of each made-up split")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.trajectories = 512
    cost, size, results = student_cost(), options.batch_size, {}
    for name, lengths in lengths_by_name(options.tokens, options.trajectories).items():
        costs = [cost(n) for n in lengths]
        shuffled = np.random.default_rng(1).permutation(len(lengths)).tolist()
        at_random = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
        ours = batch_order(lengths, batch_size=size, seed=0, epoch=0)
        results[name] = {
            "trajectories": len(lengths),
            "mean_tokens": float(np.mean(lengths)),
            "step_efficiency": efficiency(ours, costs, options.ranks),
            "random_step_efficiency": efficiency(at_random, costs, options.ranks),
        }
    if options.json:
        machine = {"processor": platform.machine(), "simulated_ranks": options.ranks}
        print(json.dumps({"machine": machine, "batch_size": size, "results": results}, indent=2))
        return
    print(f"{options.ranks} ranks, {size} trajectories a step (simulated)")
    for name, row in results.items():
        print(
            f"  {name:28} {row['trajectories']:7} trajectories, mean {row['mean_tokens']:8.0f} tokens: "
            f"{row['step_efficiency']:.1%} busy, at random {row['random_step_efficiency']:.1%}"
        )


if __name__ == "__main__":
    main()
