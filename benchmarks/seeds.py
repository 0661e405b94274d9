"""Compare the demo's arms over several training seeds: own prompts, static, trained on shuffled prompts.

    python benchmarks/seeds.py [--demo runs/demo] [--seeds 3] --out FOLDER [--json]

The runs of a finished demo are the first seed. Further seeds train the same recipes on the same trajectories, teacher rows and
student, two at a time with one thread each; then `hyperagent evaluate` compares all of them. FOLDER gets the runs and the
evaluation (evaluation.json, .md and .html). docs/results.md has the results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml
from experiments import static_folder, train

from hyperagent.progress import no_progress
from hyperagent_trainer.comparison.command import EvaluationRequest, evaluate, show, write_report
from hyperagent_trainer.runs.folder import RunFolder


def first_seed(demo: Path) -> dict[str, Path]:
    """Return the folders of the demo's own runs, by arm."""
    (own,) = (path for path in (demo / "runs").iterdir() if path.is_dir())
    controls = [path for path in (demo / "controls").iterdir() if path.is_dir()]
    (shuffled,) = (path for path in controls if RunFolder(path).read_recipe().prompts == "shuffled")
    return {"own": own, "static": static_folder(demo).parent, "trained_on_shuffled": shuffled}


def further_seeds(folders: dict[str, Path], num_seeds: int, out: Path) -> dict[str, list[Path]]:
    """Train every arm with further seeds, and return all folders by arm."""
    found = {arm: [folder] for arm, folder in folders.items()}
    jobs = []
    for seed in range(1, num_seeds):
        for arm, folder in folders.items():
            recipe = RunFolder(folder).read_recipe()
            changed = yaml.safe_load(recipe.model_copy(update={"seed": recipe.seed + seed}).model_dump_json())
            root = out / "runs" / f"{arm}-{recipe.seed + seed}"
            jobs.append((changed, root))
            found[arm].append(root)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: train(*job), jobs))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hyperagent-seeds-") as place:
        out = options.out or Path(place) / "out"
        if options.smoke:
            options.demo, options.seeds = Path(place) / "demo", 2
            command = [sys.executable, "-m", "hyperagent", "demo", "--out", str(options.demo)]
            command += ["--config", "configs/demo_smoke.yaml", "--model-store", str(Path(place) / "models")]
            subprocess.run(command, check=True, stdout=sys.stderr)
        runs = further_seeds(first_seed(options.demo), options.seeds, out)
        check = options.demo / "teacher_check.json"
        rows = options.demo / "dependent_rows.parquet"
        request = EvaluationRequest(
            own=runs["own"],
            static=runs["static"],
            trained_on_shuffled=runs["trained_on_shuffled"],
            teacher_check=check,
            dependent_rows=rows,
        )
        report = evaluate(request, progress=no_progress)
        write_report(out, report)
        show(report, out, as_json=options.json)


if __name__ == "__main__":
    main()
