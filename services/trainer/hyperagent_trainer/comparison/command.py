"""Implement `hyperagent evaluate`: compare runs on held-out trajectories and write the report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hyperagent.cli.display import print_result
from hyperagent.data.files.tokens_file import HELD_OUT
from hyperagent.model.bundle import load_bundle
from hyperagent.model.config import EMBEDDINGS
from hyperagent.model.targets import num_adapter_parameters
from hyperagent.progress import Progress
from hyperagent.storage.files import write_atomically
from hyperagent.teacher_check.dependent_rows import read_dependent_rows
from hyperagent_trainer.comparison.inputs import Comparison, load_comparison
from hyperagent_trainer.comparison.measure import measure, own_wins
from hyperagent_trainer.comparison.similarity import similarity
from hyperagent_trainer.comparison.summary import Summary, conditioning_json
from hyperagent_trainer.evaluation.arms import OWN, SHUFFLED
from hyperagent_trainer.evaluation.conditioning import DEFAULT_MARGIN
from hyperagent_trainer.evaluation_report.html import write_html
from hyperagent_trainer.evaluation_report.markdown import write_markdown
from hyperagent_trainer.evaluation_report.schema import EvaluationReport
from hyperagent_trainer.runs.folder import RunFolder


@dataclass(frozen=True)
class EvaluationRequest:
    """What is compared, and how."""

    own: Sequence[Path]
    """Folders of hypernetwork runs that differ in their seed only; the first one's adapters are looked at closely."""
    static: Sequence[Path] = ()
    trained_on_shuffled: Sequence[Path] = ()
    split: str = HELD_OUT
    margin: float = DEFAULT_MARGIN
    teacher_check: Path | None = None
    """Result of `hyperagent teacher-check compare --json`."""
    dependent_rows: Path | None = None
    """Rows of the teacher that depend on the condition, as the teacher check writes them."""
    seed: int = 0
    """Seed of the shuffled prompts and of the bootstrap."""


def evaluate(request: EvaluationRequest, *, progress: Progress) -> EvaluationReport:
    """Measure every arm that the runs allow.

    Raises:
        HyperagentError: the runs cannot be compared (see `load_comparison`), or an input is damaged.
    """
    started = time.monotonic()
    with load_comparison(request.own, request.static, request.trained_on_shuffled, split=request.split) as comparison:
        measured = measure(comparison, seed=request.seed, progress=progress)
        dependent = None if request.dependent_rows is None else read_dependent_rows(request.dependent_rows)
        summary = Summary(measured, comparison.data.trajectories, comparison.student.tokenizer, dependent)
        adapted = comparison.adapted(comparison.own[0])
        wins = own_wins(measured[OWN][0], measured[SHUFFLED][0])
        return EvaluationReport.model_validate(
            {
                **_facts(comparison, request),
                "arms": summary.arms(seed=request.seed),
                "conditioning": conditioning_json(summary.conditioning(margin=request.margin, seed=request.seed)),
                "by_position": summary.by_position(),
                "by_class": summary.by_class(),
                "similarity": similarity(adapted, comparison, own_wins=wins),
                "teacher_check": _read_teacher_check(request.teacher_check),
                "out_of_distribution": _out_of_distribution(comparison),
                "cost": _cost(comparison, started),
            }
        )


def write_report(out: Path, report: EvaluationReport) -> None:
    """Write `evaluation.json`, `evaluation.md` and `evaluation.html` to the folder `out`.

    Raises:
        StorageError: the file system reported an error.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "evaluation.json", (report.model_dump_json(indent=2) + "\n").encode())
    write_markdown(out / "evaluation.md", report)
    write_html(out / "evaluation.html", report)


def show(report: EvaluationReport, out: Path, *, as_json: bool) -> None:
    """Print the report: JSON for programs, a table and the verdict for people."""
    if as_json:
        print_result(report.model_dump(mode="json"), as_json=True)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("arm", "KL", "gap closed", "95 % interval", "top-1", "perplexity"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for name, arm in report.arms.items():
        closed = "" if arm.gap_closed is None else f"{arm.gap_closed:.1%}"
        interval = "" if arm.gap_low is None else f"{arm.gap_low:.1%} to {arm.gap_high:.1%}"
        table.add_row(name, f"{arm.kl:.4f}", closed, interval, f"{arm.top1_agreement:.1%}", f"{arm.perplexity:.3f}")
    console = Console()
    console.print(table)
    found = report.conditioning
    console.print(f"{found.verdict or 'no verdict'}: {found.reason}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"report: {out / 'evaluation.html'}", markup=False, highlight=False)


def _facts(comparison: Comparison, request: EvaluationRequest) -> dict[str, Any]:
    run, trajectories = comparison.own[0], comparison.data.trajectories
    return {
        "version": 1,
        "run": {"folder": str(run.folder), "step": run.step, "seed": run.recipe.seed},
        "view": "internalized" if run.manifest.data.settings["views"].get("internalised") else "full",
        "split": request.split,
        "num_repositories": len({t.repo for t in trajectories}),
        "num_trajectories": len(trajectories),
        "num_rows": sum(len(t.positions) for t in trajectories),
        "num_seeds": len(comparison.own),
    }


def _read_teacher_check(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    check: dict[str, Any] = json.loads(path.read_bytes())
    return {name: check[name] for name in ("kl", "dependent_share", "threshold", "num_rows", "nothing_to_distill")}


def _out_of_distribution(comparison: Comparison) -> dict[str, Any] | None:
    """Return how unlike the training prompts the held-out ones are; None if the run's bundle does not say."""
    run = comparison.own[0]
    folder = RunFolder(run.folder).bundle
    if not (folder / "bundle.json").is_file() or run.manifest.hypernetwork.featurizer != EMBEDDINGS:
        return None
    bundle = load_bundle(folder)
    found = [bundle.novelty(trajectory.prompt_ids) for trajectory in comparison.data.trajectories]
    known = [novelty for novelty in found if novelty is not None]
    if not known:
        return None
    return {
        "held_out_median": float(np.median([novelty.distance for novelty in known])),
        "threshold": known[0].threshold,
        "share_flagged": float(np.mean([novelty.is_unusual for novelty in known])),
    }


def _cost(comparison: Comparison, started: float) -> dict[str, Any]:
    run = comparison.own[0]
    adapted = comparison.adapted(run)
    prompt = comparison.data.trajectories[0].prompt_ids
    asked_at = time.perf_counter()
    adapted.adapters([prompt])
    milliseconds = 1000 * (time.perf_counter() - asked_at)
    parameters = num_adapter_parameters(run.manifest.layers, run.manifest.hypernetwork.rank)
    return {
        "adapter_ms": milliseconds,
        "adapter_parameters": parameters,
        "adapter_bytes": 4 * parameters,
        "evaluation_s": time.monotonic() - started,
    }
