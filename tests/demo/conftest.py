from __future__ import annotations

from pathlib import Path

import pytest

from hyperagent.progress import no_progress
from hyperagent_demo.sample.generate import write_sample


@pytest.fixture(scope="session")
def sample_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the smallest sample with all guaranteed properties: 72 trajectories of 24 repositories."""
    path = tmp_path_factory.mktemp("sample") / "trajectories.parquet"
    write_sample(path, seed=0, rows=72, progress=no_progress)
    return path
