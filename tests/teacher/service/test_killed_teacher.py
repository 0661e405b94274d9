"""Test SIGKILL of the teacher at random points of a population; killed_teacher.py runs more kills from the command line."""

from __future__ import annotations

from pathlib import Path

import killed_teacher
import pytest


@pytest.mark.parametrize(("kills", "trajectories"), [(3, 12), pytest.param(25, 100, marks=pytest.mark.slow)])
@pytest.mark.timeout(280)
def test_no_row_is_lost_doubled_or_changed_by_kills(
    kills: int, trajectories: int, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    verdict = killed_teacher.run(
        model_folders["qwen3_moe"], tmp_path, kills=kills, trajectories=trajectories, num_tokens=2000, seed=1
    )
    assert verdict.is_clean, verdict
    assert verdict.kills == kills
    assert verdict.rows == trajectories * 1000
    assert verdict.kills_with_work_in_progress >= kills * 2 // 5, verdict
