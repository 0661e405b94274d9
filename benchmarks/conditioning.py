"""Measure the benefit of conditioning on the prompt, in two worlds with a known answer.

    python benchmarks/conditioning.py [--seeds 3] [--world prompt] [--sweep] [--plot FILE.png] [--json]

The student is a tiny frozen Qwen3-Next with the project's own hypernetwork, injector, loss and optimizer. The baseline
is a static LoRA of the same rank and targets, at the learning rate that is best on the held-out samples. The seed
determines the world, the hypernetwork's initialization and all batches. `--sweep` also trains the hypernetwork at other
learning rates. tests/trainer/worlds.py describes the worlds. Runs on one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "trainer"))

from arms import CONSTANT_SETTINGS, PROMPT_SETTINGS, Settings, run_world
from worlds import Kind, World, train_student

from hyperagent_trainer.student.student import Student

SETTINGS: dict[Kind, Settings] = {"prompt": PROMPT_SETTINGS, "constant": CONSTANT_SETTINGS}
SWEEP = ((1 / 3, 1.0), (3.0, 1.0), (1.0, 1 / 3), (1.0, 3.0))
"""Factors of the learning rate, and of the learning rate of the heads that produce B."""


def measure(kind: Kind, seed: int, settings: Settings, student_steps: int) -> dict[str, Any]:
    """Train and evaluate in one world with one seed."""
    with tempfile.TemporaryDirectory() as place:
        folder = train_student(Path(place), World.make("prompt", seed=seed), num_steps=student_steps)
        student = Student(folder, device=torch.device("cpu"))
        outcome = run_world(World.make(kind, seed=seed), student, settings, seed=seed)
    return {
        "world": kind,
        "seed": seed,
        "learning_rate": settings.learning_rate,
        "b_head_learning_rate_factor": settings.b_head_learning_rate_factor,
        **outcome.report.to_json(),
        "static_gap_closed_by_learning_rate": outcome.static_gap_closed,
        "hypernetwork_seconds": outcome.hypernetwork_seconds,
        "static_seconds": outcome.static_seconds,
    }


def swept(settings: Settings) -> list[Settings]:
    """Return the settings and variations with other learning rates."""
    return [
        settings,
        *(
            replace(
                settings,
                learning_rate=settings.learning_rate * rate,
                b_head_learning_rate_factor=settings.b_head_learning_rate_factor * factor,
            )
            for rate, factor in SWEEP
        ),
    ]


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    """Plot the gap closed by each arm, and the conditioning gain with its interval, for every world and seed."""
    from matplotlib.figure import Figure

    arms = {"own": "#0b6e4f", "shuffled": "#c2570c", "static": "#767676"}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    bars, gains = figure.subplots(1, 2)
    labels = [f"{r['world']}\nseed {r['seed']}" for r in results]
    for offset, (arm, color) in enumerate(arms.items()):
        places = [i + (offset - 1) * 0.27 for i in range(len(results))]
        bars.bar(places, [100 * r["gap_closed"][arm] for r in results], 0.25, label=arm, color=color)
    bars.axhline(0, color="black", linewidth=0.8)
    # The adapter of another prompt may be many times worse than no adapter.
    bars.set_ylim(-110, 110)
    bars.set(title="gap closed on unseen combinations, % (cut at -110)", xticks=range(len(results)), xticklabels=labels)
    bars.legend()
    for place, result in enumerate(results):
        gain = result["conditioning_gain"]
        gains.vlines(place, gain["low"], gain["high"], color="#0b6e4f", linewidth=4)
        gains.plot(place, gain["mean"], "o", color="black")
    gains.axhline(0, color="black", linewidth=0.8)
    gains.set(title="conditioning gain, nats per token, 95% interval", xticks=range(len(results)), xticklabels=labels)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--world", choices=list(SETTINGS), help="Only this one.")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.world = 1, "prompt"
        SETTINGS["prompt"] = replace(PROMPT_SETTINGS, num_steps=2)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    student_steps = 2 if options.smoke else 240
    results = []
    for kind in [options.world] if options.world else list(SETTINGS):
        for settings in swept(SETTINGS[kind]) if options.sweep else [SETTINGS[kind]]:
            for seed in range(options.seeds):
                results.append(measure(kind, seed, settings, student_steps))
                if not options.json:
                    print(line(results[-1]), flush=True)
    if options.plot:
        plot(options.plot, results)
    if options.json:
        settings_of = {kind: {**asdict(s), "hypernetwork": s.hypernetwork.model_dump()} for kind, s in SETTINGS.items()}
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        print(
            json.dumps(
                {"machine": machine, "torch": torch.__version__, "settings": settings_of, "results": results}, indent=2
            )
        )


def line(result: dict[str, Any]) -> str:
    """Format one result as a line of text."""
    gap, gain = result["gap_closed"], result["conditioning_gain"]
    return (
        f"{result['world']:8} seed {result['seed']} lr {result['learning_rate']:.0e} x {result['b_head_learning_rate_factor']:g}: "
        f"frozen {result['kl']['frozen']:.3f} nats; gap closed own prompt {gap['own']:.1%}, "
        f"shuffled {gap['shuffled']:.1%}, "
        f"static {gap['static']:.1%}; gain {gain['mean']:.4f} [{gain['low']:.4f}, {gain['high']:.4f}]; {result['verdict']}; "
        f"{result['hypernetwork_seconds']:.0f} s and {result['static_seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
