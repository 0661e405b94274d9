"""Compare variants of the hypernetwork on the demo's house rules: which of them make the prompt matter?

    python benchmarks/experiments.py [--demo runs/demo] [--seeds 2] [--steps N] [--variants NAME ...] [--json]

Every variant changes some fields of the demo's recipe and is trained with several seeds of the hypernetwork on the same
trajectories, teacher rows and student; then the arms own, shuffled and mean are measured on the held-out repositories. The
static LoRA's figure is that of the demo's own best rate. Without a finished demo in the folder, one is run there. Two runs
at a time, with one thread each. docs/experiments.md has the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from hyperagent.progress import no_progress
from hyperagent_trainer.comparison.command import EvaluationRequest, evaluate
from hyperagent_trainer.config import load_recipe
from hyperagent_trainer.runs.folder import RunFolder

VARIANTS: dict[str, dict[str, Any]] = {
    "as the demo": {},
    "every id is read": {"hypernetwork": {"max_document_frequency": 1.0}},
    "no neighbors": {"hypernetwork": {"neighbors": 0}},
    "1 neighbor": {"hypernetwork": {"neighbors": 1}},
    "neither": {"hypernetwork": {"max_document_frequency": 1.0, "neighbors": 0}},
    "hidden@1": {"hypernetwork": {"featurizer": "hidden@1"}},
    "hidden@2": {"hypernetwork": {"featurizer": "hidden@2"}},
    "width 128": {"hypernetwork": {"width": 128, "num_latents": 16}},
    "rank 16": {"hypernetwork": {"rank": 16, "alpha": 32}},
    "average of weights": {"ema_decay": 0.99},
    "warm start": {"warm_start": "STATIC"},
    "half the steps": {"num_steps": 0.5},
    "twice the steps": {"num_steps": 2.0},
}


def variant_recipe(
    base: dict[str, Any], changes: dict[str, Any], *, seed: int, steps: int, static: str
) -> dict[str, Any]:
    """Return the demo's recipe with a variant's changes; a number of steps is a factor."""
    recipe = {**base, "seed": seed, "num_steps": steps, "hypernetwork": {**base["hypernetwork"]}}
    for name, value in changes.items():
        if name == "hypernetwork":
            recipe["hypernetwork"].update(value)
        elif name == "num_steps":
            recipe["num_steps"] = round(steps * value)
        else:
            recipe[name] = static if value == "STATIC" else value
    # The end is evaluated below, with more arms.
    return {**recipe, "evaluate_every": recipe["num_steps"], "checkpoint_every": recipe["num_steps"]}


def train(recipe: dict[str, Any], root: Path) -> float:
    """Train in a process of its own with one thread, and return the seconds it took."""
    root.mkdir(parents=True)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = RunFolder(root)
    folder.recipe.write_text(load_recipe(root / "recipe.yaml").model_dump_json())
    started = time.perf_counter()
    with folder.log.open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "hyperagent_trainer.worker", str(root)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"training failed; see {folder.log}")
    return time.perf_counter() - started


def measure(root: Path) -> dict[str, Any]:
    """Return the share of the gap that each arm closes, and how alike the adapters are."""
    report = evaluate(EvaluationRequest(own=[root]), progress=no_progress)
    closed = {arm: report.arms[arm].gap_closed for arm in ("own", "shuffled", "mean")}
    preflight = json.loads((root / "preflight.json").read_bytes())
    shares = [c["measured"]["share of feature energy"] for c in preflight["checks"] if c["name"] == "prompt_share"]
    cosine = None if report.similarity is None else report.similarity.mean_cosine
    return {"gap_closed": closed, "cosine": cosine, "energy_share_at_start": shares[0] if shares else None}


def static_folder(demo: Path) -> Path:
    """Return the adapter of the demo's best static run."""
    runs = [RunFolder(path) for path in sorted((demo / "controls").iterdir()) if (path / "adapter").is_dir()]
    return min(runs, key=lambda run: run.read_status().held_out_kl["adapter"] or float("inf")).adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="by default the demo's")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hyperagent-experiments-") as place:
        if options.smoke:
            options.demo, options.seeds, options.variants = Path(place) / "demo", 1, ["as the demo", "warm start"]
        if not (options.demo / "report.json").is_file():
            command = [sys.executable, "-m", "hyperagent", "demo", "--out", str(options.demo)]
            if options.smoke:
                command += ["--config", "configs/demo_smoke.yaml", "--model-store", str(Path(place) / "models")]
            subprocess.run(command, check=True, stdout=sys.stderr)
        base = yaml.safe_load((options.demo / "recipes" / "demo.yaml").read_text())
        steps, static = options.steps or base["num_steps"], str(static_folder(options.demo).resolve())
        jobs = [(name, seed) for name in options.variants for seed in range(options.seeds)]

        def run(job: tuple[str, int]) -> dict[str, Any]:
            name, seed = job
            root = Path(place) / f"{name}-{seed}"
            recipe = variant_recipe(base, VARIANTS[name], seed=seed, steps=steps, static=static)
            seconds = train(recipe, root)
            result = {"variant": name, "seed": seed, "steps": recipe["num_steps"], "seconds": seconds, **measure(root)}
            if not options.json:
                print(line(result), flush=True)
            return result

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(run, jobs))
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "threads": 1}
        print(json.dumps({"machine": machine, "torch": torch.__version__, "results": results}, indent=2))


def line(result: dict[str, Any]) -> str:
    """Format one result as a line of text."""
    closed, share = result["gap_closed"], result["energy_share_at_start"]
    cosine = "none" if result["cosine"] is None else f"{result['cosine']:.3f}"
    return (
        f"{result['variant']:18} seed {result['seed']} {result['steps']:5} steps: gap closed own {closed['own']:7.1%}, "
        f"shuffled {closed['shuffled']:7.1%}, mean {closed['mean']:7.1%}; cosine {cosine}; "
        f"energy {'unknown' if share is None else f'{share:.4f}'}; {result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
