"""Test of a long trajectory's memory by extrapolation; benchmarks/long_trajectory.py measures the full length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "long_trajectory.py"


@pytest.mark.slow
def test_a_trajectory_of_131072_tokens_fits_into_8_gib() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--tokens", "4096", "12288", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    short, long = json.loads(done.stdout)["results"]
    # Memory is linear in the number of tokens, so the two lengths determine the memory at the longest.
    per_token = (long["peak_rss_bytes"] - short["peak_rss_bytes"]) / (long["tokens"] - short["tokens"])
    assert short["peak_rss_bytes"] + per_token * (131_072 - short["tokens"]) < 8 * 2**30
