"""Fixtures that inject faults into the system calls of a process that uses the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from needs import skip_or_fail

SHARED_TESTS = Path(__file__).parents[1]
InjectFaults = Callable[..., dict[str, int]]


@pytest.fixture(scope="session")
def fault_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library that makes calls fail."""
    if (compiler := shutil.which("cc")) is None:
        skip_or_fail("there is no C compiler")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SHARED_TESTS / "faults.c", "-ldl"], check=True)
    return library


@pytest.fixture
def inject_faults(fault_library: Path, tmp_path: Path) -> InjectFaults:
    """Run `cache_faults.py` with these arguments and return its counts."""

    def run(what: str, *arguments: str) -> dict[str, int]:
        command = [sys.executable, SHARED_TESTS / "cache_faults.py", what, tmp_path / "caches", *arguments]
        environment = {**os.environ, "LD_PRELOAD": str(fault_library)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run
