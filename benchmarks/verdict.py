"""Simulate how often verdicts on conditioning are wrong, and how often intervals over few repositories hold the truth.

    python benchmarks/verdict.py [--evaluations 500] [--json]

Every evaluation has a known advantage of own prompts over a static LoRA; tests/trainer/repositories.py describes what is drawn.
Reported are, over simulated evaluations:

    misses of an interval     how often the advantage is below, and above, its 95% interval (2.5% each are due): for the
                              report's interval, Student's t and the percentile bootstrap
    above at 0, at margin     how often the interval of the advantage less the margin is above 0, which claims that conditioning
                              pays, where the advantage is 0, and exactly the margin; both claims are false
    below at margin           how often it is below 0 where the advantage is exactly the margin: a false "a static LoRA suffices"
    pays at 0, at margin,     verdicts "conditioning pays" for an advantage of 0, of the margin, and of three times the margin;
    at 3 margins              the last ones are right
    suffices at 0, at margin  verdicts "a static LoRA suffices" for the same; the first ones are right

Runs on one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import Counter
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "trainer"))

from repositories import FROZEN_KL, Setting, Simulated, Skew, by_repository, percentile_interval, simulate, t_interval

from hyperagent_trainer.evaluation.arms import STATIC
from hyperagent_trainer.evaluation.conditioning import DEFAULT_MARGIN, ConditioningReport, conditioning_report
from hyperagent_trainer.evaluation.verdict import PAYS, STATIC_SUFFICES

REPOSITORIES = (4, 6, 8, 12, 24)
SKEWS: tuple[Skew, ...] = ("normal", "right", "left")
SAMPLES_AND_SEEDS = ((1, 1), (6, 1), (6, 3))
EFFECTS = {"0": 0.0, "margin": DEFAULT_MARGIN, "3 margins": 3 * DEFAULT_MARGIN}


def measure(setting: Setting, evaluations: int, seed: int) -> dict[str, Any]:
    """Simulate evaluations of one setting; every rate is a share of them."""
    generator = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    for _ in range(evaluations):
        drawn = simulate(setting, generator)
        counts.update(events(drawn, {name: report_of(drawn, effect) for name, effect in EFFECTS.items()}))
    return {**asdict(setting), **{name: counts[name] / evaluations for name in names()}}


def report_of(drawn: Simulated, effect: float) -> ConditioningReport:
    """Return the report on an evaluation in which own prompts save `effect` of the frozen KL over a static LoRA."""
    return conditioning_report(drawn.sums(effect), drawn.rows_N, drawn.repositories)


def events(drawn: Simulated, reports: dict[str, ConditioningReport]) -> list[str]:
    """Return the names of what happened in one evaluation with the reports at every effect."""
    found = []
    for effect, report in reports.items():
        if report.beyond_margin[STATIC].is_above_zero:
            found.append(f"above at {effect}")
        if report.beyond_margin[STATIC].is_below_zero:
            found.append(f"below at {effect}")
        found += [f"{name} at {effect}" for name, verdict in VERDICTS.items() if report.verdict == verdict]
    over_static = reports["margin"].over_static
    assert over_static is not None
    assert over_static.low is not None
    assert over_static.high is not None
    sums = drawn.sums(DEFAULT_MARGIN)
    saved_SC = by_repository(sums["static"] - sums["own"], drawn.repositories)
    rows_C = by_repository(drawn.rows_N.astype(float), drawn.repositories)[0]
    intervals = {
        "report": (over_static.low, over_static.high),
        "t": t_interval(saved_SC, rows_C),
        "percentile": percentile_interval(saved_SC, rows_C, seed=0),
    }
    truth = DEFAULT_MARGIN * FROZEN_KL
    for name, (low, high) in intervals.items():
        found += [f"{name}: truth below"] * (truth < low) + [f"{name}: truth above"] * (truth > high)
    return found


VERDICTS = {"pays": PAYS, "suffices": STATIC_SUFFICES}


def names() -> list[str]:
    """Return the names of all rates."""
    rates = [f"{event} at {effect}" for event in ("above", "below", *VERDICTS) for effect in EFFECTS]
    return rates + [f"{name}: truth {side}" for name in ("report", "t", "percentile") for side in ("below", "above")]


def line(result: dict[str, Any]) -> str:
    """Format one result as a row of the table in docs/evaluation.md."""

    def percent(*rates: str) -> str:
        return " / ".join(f"{100 * result[rate]:.1f}" for rate in rates)

    cells = [
        f"{result['num_repositories']}",
        result["skew"],
        "1" if result["most_samples"] == 1 else f"1 to {result['most_samples']}",
        f"{result['num_seeds']}",
        *(percent(f"{name}: truth below", f"{name}: truth above") for name in ("percentile", "t", "report")),
        percent("above at 0", "above at margin"),
        percent("below at margin"),
        percent("pays at 3 margins"),
        percent("suffices at 0"),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    settings = [
        Setting(num, skew, most_samples, num_seeds)
        for (most_samples, num_seeds), skew, num in product(SAMPLES_AND_SEEDS, SKEWS, REPOSITORIES)
    ]
    if options.smoke:
        options.evaluations, settings = 2, settings[-1:]
    results = []
    for seed, setting in enumerate(settings):
        results.append(measure(setting, options.evaluations, seed))
        if not options.json:
            print(line(results[-1]), flush=True)
    if options.json:
        machine = {"processor": platform.processor() or platform.machine()}
        print(
            json.dumps(
                {
                    "machine": machine,
                    "numpy": np.__version__,
                    "evaluations": options.evaluations,
                    "margin": DEFAULT_MARGIN,
                    "results": results,
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
