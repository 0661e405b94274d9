"""Exit 1 unless a demo's report.json keeps its bounds.

check_report.py REPORT --seconds 300 --gib 4 --kl-ratio 0.8 [--conditioning-pays]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_LEAST_OWN = 0.35
_MOST_STATIC_OF_OWN = 0.5
_MOST_SHUFFLED_OF_OWN = 0.2


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument(
        "--kl-ratio", type=float, required=True, help="most that the adapter may leave of the frozen KL"
    )
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--gib", type=float, required=True)
    parser.add_argument("--conditioning-pays", action="store_true", help="require the verdict and the arms' figures")
    bounds = parser.parse_args()
    report = json.loads(bounds.report.read_text(encoding="utf-8"))
    kl = report["held_out_kl"]
    at_most = {
        "held-out KL, adapter / frozen": (kl["adapter"] / kl["frozen"], bounds.kl_ratio),
        "PEFT against training, largest difference of a logit": (report["peft_max_abs_diff"], 1e-4),
        "seconds in total": (report["seconds"]["total"], bounds.seconds),
        "peak memory, GiB": (report["peak_rss_bytes"] / 2**30, bounds.gib),
    }
    facts = {"the teacher is the better model on held-out text": report["teacher"]["better_on_held_out"]}
    if bounds.conditioning_pays:
        facts |= _conditioning(report)
        own = report["gap_closed"]["own"]
        at_most["gap closed, static / own"] = (report["gap_closed"]["static"] / own, _MOST_STATIC_OF_OWN)
        at_most["gap closed, shuffled / own"] = (report["gap_closed"]["shuffled"] / own, _MOST_SHUFFLED_OF_OWN)
    for name, (value, bound) in at_most.items():
        sys.stdout.write(f"{'ok  ' if value <= bound else 'FAIL'} {name}: {value:.4g} (at most {bound:g})\n")
    for name, holds in facts.items():
        sys.stdout.write(f"{'ok  ' if holds else 'FAIL'} {name}\n")
    return int(not all(facts.values()) or any(value > bound for value, bound in at_most.values()))


def _conditioning(report: dict[str, Any]) -> dict[str, bool]:
    own, gain = report["gap_closed"]["own"], report["conditioning_gain"]
    return {
        f"gap closed by own prompts: {own:.1%} (at least {_LEAST_OWN:.0%})": own >= _LEAST_OWN,
        f"conditioning gain: {gain['low']:.3g} to {gain['high']:.3g} nats, above 0": gain["low"] > 0,
        f"verdict: {report['verdict']}": report["verdict"] == "conditioning pays",
        "the teacher's rows depend on the condition": not report["teacher_check"]["nothing_to_distill"],
    }


if __name__ == "__main__":
    sys.exit(main())
