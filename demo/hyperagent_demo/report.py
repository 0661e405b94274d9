"""Write the demo's results: report.json, a table, a plot."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hyperagent import __version__
from hyperagent.data.files.tokens_file import HELD_OUT, TRAIN
from hyperagent.storage.files import write_atomically
from hyperagent_demo.config import DemoConfig
from hyperagent_demo.loop import LoopResult

_ARMS = ("frozen", "adapter", "adapter_shuffled_prompt")
_PACKAGES = ("torch", "transformers", "peft", "grpcio", "fastapi")


def versions() -> dict[str, str]:
    """Return the versions of the software that a result depends on."""
    return {
        "hyperagent": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def build_report(
    config: DemoConfig, result: LoopResult, *, seconds: dict[str, float], peak_rss_bytes: int
) -> dict[str, Any]:
    """Return the contents of report.json."""
    tokenized, cache, pretrained = result.tokenized, result.cache, result.models.results
    return {
        "data": {
            "path": str(result.source),
            "rows": sum(tokenized.splits.values()),
            "fingerprint": tokenized.fingerprint,
            "tokens": tokenized.tokens,
            "supervised_tokens": tokenized.supervised_tokens,
            "rows_in_file": tokenized.rows,
            "rows_chosen": tokenized.chosen,
            "rows_refused": len(tokenized.refused),
            "train": tokenized.splits[TRAIN],
            "held_out": tokenized.splits[HELD_OUT],
        },
        "held_out_kl": result.run.held_out_kl,
        "peft_max_abs_diff": result.peft["max_abs_diff"],
        "adapter_effect": result.peft["adapter_effect"],
        "cache": {
            "tokens": cache.supervised_tokens,
            "context_tokens": cache.context_tokens,
            "bytes": cache.bytes,
            "bytes_per_token": cache.bytes_per_token,
            "top_k": config.top_k,
        },
        "teacher": {
            **pretrained["teacher"].model_dump(),
            "steps_planned": config.teacher.num_steps,
            "better_on_held_out": pretrained["teacher"].held_out_nll < pretrained["student"].held_out_nll,
        },
        "student": {**pretrained["student"].model_dump(), "steps_planned": config.student.num_steps},
        "run": {"id": result.run.id, "steps": result.run.step},
        "prompt": result.prompt,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes,
        "seed": config.seed,
        "versions": versions(),
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())


def print_report(console: Console, report: dict[str, Any], *, plot: Path) -> None:
    """Print the key numbers as a table."""
    kl = report["held_out_kl"]
    table = Table(title="held-out KL to the teacher, nats per supervised token", title_justify="left", box=None)
    for heading in ("arm", "KL", "of frozen"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in _ARMS:
        table.add_row(arm, f"{kl[arm]:.4f}", f"{kl[arm] / kl['frozen']:.1%}")
    console.print(table)
    facts = Table(box=None, show_header=False)
    data, cache = report["data"], report["cache"]
    facts.add_row("data", f"{data['rows']} trajectories, {data['tokens']:,} tokens ({data['path']})")
    facts.add_row("cache", f"{cache['tokens']:,} supervised tokens, {cache['bytes_per_token']:.0f} bytes each")
    facts.add_row("PEFT against training", f"largest difference of a logit {report['peft_max_abs_diff']:.1e}")
    facts.add_row("time", f"{report['seconds']['total']:.0f} s")
    facts.add_row("memory", f"{report['peak_rss_bytes'] / 2**30:.2f} GiB at most")
    facts.add_row("plot", str(plot))
    console.print(facts)
    if not report["teacher"]["better_on_held_out"]:
        console.print(
            f"The teacher is not better than the student on held-out text ({report['teacher']['held_out_nll']:.3f} "
            f"against {report['student']['held_out_nll']:.3f} nats per token), so the student cannot learn from it. Give "
            "it more steps or time in the configuration.",
            style="bold red",
        )
    for role in ("teacher", "student"):
        if report[role]["steps"] < report[role]["steps_planned"]:
            console.print(
                f"The {role} completed {report[role]['steps']} of {report[role]['steps_planned']} pre-training steps in "
                "the time limit; on a faster machine, or with a larger max_seconds, the numbers will differ.",
                style="yellow",
            )


def write_plot(path: Path, metrics: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """Plot the loss curve with the evaluations, and the held-out KL of every arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "held_out_kl" in line]
    colors = {"frozen": "#767676", "adapter": "#0b6e4f", "adapter_shuffled_prompt": "#c2570c"}
    figure, (curve, bars) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 1), layout="constrained")
    curve.plot(
        [s["step"] for s in steps], [s["loss"] for s in steps], color="#9ecae1", lw=1, label="training, per batch"
    )
    for arm in _ARMS:
        curve.plot(
            [e["step"] for e in evaluations],
            [e["held_out_kl"][arm] for e in evaluations],
            color=colors[arm],
            marker="o",
            ms=4,
            ls="--" if arm == "adapter_shuffled_prompt" else "-",
            label=f"held out, {arm}",
        )
    curve.set(xlabel="optimizer step", ylabel="KL(teacher || student), nats per supervised token", ylim=(0, None))
    curve.set_title("Distillation")
    curve.legend(frameon=False, fontsize=8)
    kl = report["held_out_kl"]
    drawn = bars.bar(range(len(_ARMS)), [kl[arm] for arm in _ARMS], color=[colors[arm] for arm in _ARMS])
    bars.bar_label(drawn, fmt="%.3f", padding=2)
    bars.set_xticks(range(len(_ARMS)), ["frozen", "adapter", "adapter,\nshuffled prompt"])
    bars.set_title("Held-out repositories")
    for axes in (curve, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
