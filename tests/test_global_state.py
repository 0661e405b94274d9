"""The check that no test leaves global state behind notices each kind of it."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from global_state import differences, seeded, snapshot

ROOT = Path(__file__).parents[1]


def set_default_dtype() -> Callable[[], None]:
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


def set_threads() -> Callable[[], None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    return lambda: torch.set_num_threads(before)


def lower_precision() -> Callable[[], None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    return lambda: torch.set_float32_matmul_precision(before)


def set_variable() -> Callable[[], None]:
    os.environ["HYPERAGENT_LEFT"] = "1"
    return lambda: os.environ.__delitem__("HYPERAGENT_LEFT")


def change_directory() -> Callable[[], None]:
    before = Path.cwd()
    os.chdir("/")
    return lambda: os.chdir(before)


def extend_path() -> Callable[[], None]:
    sys.path.append("left")
    return lambda: sys.path.remove("left")


def handle_signal() -> Callable[[], None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    return lambda: signal.signal(signal.SIGUSR1, before) and None


def add_handler() -> Callable[[], None]:
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    return lambda: logging.getLogger().removeHandler(handler)


def set_level() -> Callable[[], None]:
    logging.getLogger("hyperagent.left").setLevel(logging.DEBUG)
    return lambda: logging.getLogger("hyperagent.left").setLevel(logging.NOTSET)


def configure_structlog() -> Callable[[], None]:
    before = structlog.get_config()
    structlog.configure(processors=[])
    return lambda: structlog.configure(**before)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (set_default_dtype, "torch default dtype"),
        (set_threads, "torch threads"),
        (lower_precision, "torch precision of float32 products"),
        (set_variable, "environment variable HYPERAGENT_LEFT"),
        (change_directory, "working directory"),
        (extend_path, "sys.path"),
        (handle_signal, "handler of SIGUSR1"),
        (add_handler, "handlers of the root logger"),
        (set_level, "levels of loggers"),
        (configure_structlog, "configuration of structlog"),
    ],
)
def test_each_change_of_global_state_is_named(change: Callable[[], Callable[[], None]], name: str) -> None:
    before = snapshot()
    restore = change()
    try:
        found = differences(before, snapshot())
    finally:
        restore()
    assert len(found) == 1
    assert found[0].startswith(f"{name}: ")
    assert differences(before, snapshot()) == []


def test_seeded_code_draws_the_same_numbers_and_leaves_the_generators_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    outside = draw()
    with seeded():
        first = draw()
    following = draw()
    with seeded():
        assert draw() == first
    assert following not in (outside, first)


@pytest.mark.parametrize("scope", ["function", "module"])
def test_a_test_that_leaves_global_state_behind_fails(scope: str, tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(
        "import os, pytest\n"
        f"@pytest.fixture(scope={scope!r})\n"
        "def careless():\n"
        "    os.environ['HYPERAGENT_LEFT'] = '1'\n"
        "def test_careless(careless):\n"
        "    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [*command, "--rootdir", tmp_path, "-p", "conftest", tmp_path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "environment variable HYPERAGENT_LEFT: None became '1'" in done.stdout
