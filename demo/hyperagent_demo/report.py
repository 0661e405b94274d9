"""Write the demo's results: report.json, a table, a plot."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.table import Table

from hyperagent import __version__
from hyperagent.data.files.tokens_file import HELD_OUT, TRAIN
from hyperagent.storage.files import write_atomically
from hyperagent_demo.config import DemoConfig
from hyperagent_demo.loop import LoopResult
from hyperagent_demo.sample.house_rules import HouseRules, followed

_REPORTED_ARMS = ("static", "own", "shuffled", "mean", "trained_on_shuffled")
ARM_WORDS = {
    "static": "one LoRA for every prompt",
    "own": "adapter of the own prompt",
    "shuffled": "adapter of another repository's prompt",
    "mean": "mean of many prompts' adapters",
    "trained_on_shuffled": "hypernetwork trained on shuffled prompts",
}
TEXT_WORDS = {
    "frozen": "student alone:",
    "own": "with the adapter:",
    "shuffled": "with another's adapter:",
}
_CURVES = {"frozen": "#767676", "adapter": "#0b6e4f", "adapter_shuffled_prompt": "#c2570c"}
_CURVE_WORDS = {
    "frozen": "student alone",
    "adapter": "own prompt",
    "adapter_shuffled_prompt": "another repository's prompt",
}
_TAGS = re.compile(r"</?(?:tool_call|function|parameter)[^>]*>")
"""Markup of tool calls, which is left out where a text is shown to people."""
_SHOWN_CHARACTERS = 300
"""Most characters of a task or a generated text that are printed."""
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
    run, arms, compared = result.distilled.run, result.evaluation["arms"], result.evaluation["conditioning"]
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
        "verdict": compared["verdict"],
        "reason": compared["reason"],
        "gap_closed": {arm: arms[arm]["gap_closed"] for arm in _REPORTED_ARMS if arm in arms},
        "gap_interval": {arm: [arms[arm]["gap_low"], arms[arm]["gap_high"]] for arm in _REPORTED_ARMS if arm in arms},
        "conditioning_gain": compared["conditioning_gain"],
        "teacher_check": result.teacher_check,
        "held_out_kl": run.held_out_kl,
        "peft_max_abs_diff": result.peft["max_abs_diff"],
        "adapter_effect": result.peft["adapter_effect"],
        "texts": result.texts,
        "house_rules": _followed_rules(result.texts, result.example.dialogue.system),
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
        "run": {"id": run.id, "steps": run.step},
        "prompt": result.example.dialogue.task,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes,
        "seed": config.seed,
        "versions": versions(),
    }


def _followed_rules(texts: dict[str, str], system: str | None) -> dict[str, dict[str, bool]] | None:
    """Return which house rules each text follows, by arm; None for data without house rules."""
    rules = HouseRules.read(system or "")
    return None if rules is None else {arm: followed(text, rules) for arm, text in texts.items()}


def write_report(path: Path, report: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())


def print_report(console: Console, report: dict[str, Any], *, out: Path) -> None:
    """Print the verdict, the arms, the texts and the key numbers."""
    console.print(f"Verdict: [bold]{report['verdict']}[/]: {report['reason']}.", soft_wrap=True, highlight=False)
    table = Table(
        title="share of the gap to the teacher that is closed, held-out repositories", title_justify="left", box=None
    )
    for heading in ("", "gap closed", "95 % interval"):
        table.add_column(heading, justify="right" if heading else "left")
    for arm, share in report["gap_closed"].items():
        low, high = report["gap_interval"][arm]
        interval = "" if low is None else f"{low:.1%} to {high:.1%}"
        table.add_row(ARM_WORDS[arm], "no gap" if share is None else f"{share:.1%}", interval)
    console.print(table)
    _print_texts(console, report)
    facts = Table(box=None, show_header=False)
    data, cache, check = report["data"], report["cache"], report["teacher_check"]
    facts.add_row("data", f"{data['rows']} trajectories, {data['tokens']:,} tokens ({data['path']})")
    facts.add_row("teacher", f"{check['dependent_share']:.1%} of its rows depend on the condition")
    facts.add_row("cache", f"{cache['tokens']:,} supervised tokens, {cache['bytes_per_token']:.0f} bytes each")
    facts.add_row("PEFT against training", f"largest difference of a logit {report['peft_max_abs_diff']:.1e}")
    facts.add_row("time", f"{report['seconds']['total']:.0f} s")
    facts.add_row("memory", f"{report['peak_rss_bytes'] / 2**30:.2f} GiB at most")
    facts.add_row("plot", str(out / "report.png"))
    facts.add_row("report", str(out / "evaluation.html"))
    console.print(facts)
    _print_warnings(console, report)


def _print_texts(console: Console, report: dict[str, Any]) -> None:
    """Print what the student writes for one held-out task, and which house rules of the repository each text follows."""
    console.print(f"\nTask: {shorten(report['prompt'], _SHOWN_CHARACTERS)}", markup=False, highlight=False)
    for arm, text in report["texts"].items():
        line = shorten(_TAGS.sub(" ", text), _SHOWN_CHARACTERS)
        console.print(f"  {TEXT_WORDS[arm]:24} {line}", markup=False, highlight=False, soft_wrap=True)
        if report["house_rules"] is not None:
            marks = (
                f"[green]{rule}[/]" if kept else f"[red]not {rule}[/]"
                for rule, kept in report["house_rules"][arm].items()
            )
            console.print(f"  {'':24} {', '.join(marks)}", highlight=False)
    if report["house_rules"] is not None:
        console.print("  (Only this repository's system prompt states its rules, and the student does not see it.)\n")


def _print_warnings(console: Console, report: dict[str, Any]) -> None:
    if not report["teacher"]["better_on_held_out"]:
        console.print(
            f"The teacher is not better than the student on held-out text ({report['teacher']['held_out_nll']:.3f} "
            f"against {report['student']['held_out_nll']:.3f} nats per token), so the student cannot learn from it. Give "
            "it more steps or time in the configuration.",
            style="bold red",
        )
    if report["teacher_check"]["nothing_to_distill"]:
        console.print(
            f"The teacher hardly uses the condition: {report['teacher_check']['dependent_share']:.1%} of its rows change "
            "with it. There is nothing to distill here; choose a richer condition, or another view.",
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
    """Plot the training curve, and the share of the gap that each arm closes, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "held_out_kl" in line]
    figure, (curve, bars) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1, 1), layout="constrained")
    curve.plot(
        [s["step"] for s in steps], [s["loss"] for s in steps], color="#9ecae1", lw=1, label="training, per batch"
    )
    for arm, color in _CURVES.items():
        curve.plot(
            [e["step"] for e in evaluations],
            [e["held_out_kl"][arm] for e in evaluations],
            color=color,
            marker="o",
            ms=4,
            label=f"held out, {_CURVE_WORDS[arm]}",
        )
    curve.set(xlabel="optimizer step", ylabel="KL(teacher || student), nats per supervised token", ylim=(0, None))
    curve.set_title("Training the hypernetwork")
    curve.legend(frameon=False, fontsize=8)
    arms = [arm for arm in reversed(report["gap_closed"]) if report["gap_closed"][arm] is not None]
    for place, arm in enumerate(arms):
        share, (low, high) = 100 * report["gap_closed"][arm], report["gap_interval"][arm]
        bars.barh(place, share, color="#0b6e4f" if arm == "own" else "#b5b5b5")
        if low is not None:
            bars.hlines(place, 100 * low, 100 * high, color="black", lw=1.5)
        bars.annotate(
            f"{share:.0f} %", (max(share, 100 * (high or 0), 0), place), (4, 0), textcoords="offset points", va="center"
        )
    bars.axvline(0, color="black", lw=0.8)
    bars.margins(x=0.15)
    bars.set_yticks(range(len(arms)), [ARM_WORDS[arm] for arm in arms])
    bars.set(xlabel="gap to the teacher that is closed, % (line: 95 % interval)")
    bars.set_title(f"Unseen repositories: {report['verdict'] or 'no verdict'}")
    for axes in (curve, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y" if axes is curve else "x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
