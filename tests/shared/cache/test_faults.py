"""The cache under faults: every call that fails, every call that is the last, SIGKILL at any moment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls fail; tests that need it are skipped without a C compiler, except in CI."""
    if (compiler := shutil.which("cc")) is None:
        if os.environ.get("CI"):
            pytest.fail("there is no C compiler, and CI must not skip this")
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    return library


def run(faults: Path, folder: Path, *what: str) -> dict[str, int]:
    command = [sys.executable, HERE / "cache_faults.py", what[0], folder, *what[1:]]
    environment = {**os.environ, "LD_PRELOAD": str(faults)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(600)
def test_whichever_call_fails_nothing_is_lost_and_the_next_try_succeeds(faults: Path, tmp_path: Path) -> None:
    calls = run(faults, tmp_path / "caches", "errors")
    assert set(calls) == {
        "ENOSPC", "ENOSPC once", "EIO", "EIO from then on", "EIO on reading", "EMFILE", "EMFILE once",
    }  # fmt: skip
    assert min(calls.values()) > 20


@pytest.mark.timeout(600)
def test_whichever_call_is_the_last_what_was_acknowledged_is_there(faults: Path, tmp_path: Path) -> None:
    calls = run(faults, tmp_path / "caches", "kills")
    assert calls["before"] == calls["after"] > 100


@pytest.mark.timeout(600)
def test_500_kills_at_random_moments(faults: Path, tmp_path: Path) -> None:
    result = run(faults, tmp_path / "caches", "random", "--kills", "500")
    assert result["kills"] == 500
    assert result["acknowledged"] > 100
