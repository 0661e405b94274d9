"""Exit 1 unless a demo's report.json keeps its bounds: `check_report.py REPORT --kl-ratio 0.8 --seconds 300 --gib 4`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument(
        "--kl-ratio", type=float, required=True, help="most that the adapter may leave of the frozen KL"
    )
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--gib", type=float, required=True)
    bounds = parser.parse_args()
    report = json.loads(bounds.report.read_text(encoding="utf-8"))
    kl = report["held_out_kl"]
    measured = {
        "held-out KL, adapter / frozen": (kl["adapter"] / kl["frozen"], bounds.kl_ratio),
        "PEFT against training, largest difference of a logit": (report["peft_max_abs_diff"], 1e-4),
        "seconds in total": (report["seconds"]["total"], bounds.seconds),
        "peak memory, GiB": (report["peak_rss_bytes"] / 2**30, bounds.gib),
    }
    for name, (value, bound) in measured.items():
        sys.stdout.write(f"{'ok  ' if value <= bound else 'FAIL'} {name}: {value:.4g} (at most {bound:g})\n")
    better = report["teacher"]["better_on_held_out"]
    sys.stdout.write(f"{'ok  ' if better else 'FAIL'} the teacher is the better model on held-out text\n")
    return int(not better or any(value > bound for value, bound in measured.values()))


if __name__ == "__main__":
    sys.exit(main())
