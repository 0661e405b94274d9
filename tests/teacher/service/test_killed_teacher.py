"""SIGKILL of the teacher at random points of a population: see killed_teacher.py, which runs more of them by hand."""

from __future__ import annotations

from pathlib import Path

import killed_teacher
import pytest


@pytest.mark.timeout(280)
def test_no_row_is_lost_doubled_or_changed_by_25_kills(model_folders: dict[str, Path], tmp_path: Path) -> None:
    verdict = killed_teacher.run(
        model_folders["qwen3_moe"], tmp_path, kills=25, trajectories=100, num_tokens=2000, seed=1
    )
    assert verdict.is_clean, verdict
    assert verdict.kills == 25
    assert verdict.rows == 100 * 1000
    assert verdict.kills_with_work_in_progress >= 10, verdict
