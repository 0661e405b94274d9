"""Fixtures of all tests, the check that tests leave no global state behind, and the report of deselected slow tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from global_state import differences, seeded, snapshot
from needs import skip_or_fail

# Triton reads it when it is first imported, by whichever test: its kernels must run without a GPU.
os.environ["TRITON_INTERPRET"] = "1"

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
_NUM_DESELECTED = pytest.StashKey[int]()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            stash = item.config.stash
            stash[_NUM_DESELECTED] = stash.get(_NUM_DESELECTED, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the number of deselected tests from a worker of pytest-xdist to the process that reports."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["num_deselected"] = session.config.stash.get(_NUM_DESELECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # Every worker collects all tests, so every worker deselects the same ones.
    node.config.stash[_NUM_DESELECTED] = getattr(node, "workeroutput", {}).get("num_deselected", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if number := config.stash.get(_NUM_DESELECTED, 0):
        terminalreporter.write_line(
            f"{number} slow tests were not run: `make test-all` runs everything, `pytest -m slow` only these."
        )


@pytest.fixture(autouse=True, scope="module")
def module_leaves_no_global_state() -> Iterator[None]:
    """Fail a module whose fixtures leave process-wide state changed: see global_state.py."""
    before = snapshot()
    yield
    if changes := differences(before, snapshot()):
        pytest.fail("fixtures of this module left global state behind: " + "; ".join(changes), pytrace=False)


@pytest.fixture(autouse=True)
def leaves_no_global_state(module_leaves_no_global_state: None) -> Iterator[None]:
    """Seed the global random generators; fail a test that leaves process-wide state changed: see global_state.py."""
    before = snapshot()
    with seeded():
        yield
    if changes := differences(before, snapshot()):
        pytest.fail("the test left global state behind: " + "; ".join(changes), pytrace=False)


@pytest.fixture(scope="session")
def real_data_if_present() -> Path | None:
    """Return the folder of real agent trajectories and the real tokenizer, next to the repository; CI must have it."""
    if (REAL_DATA / "trajectories" / "dev.parquet").is_file() and (REAL_DATA / "qwen-tokenizer").is_dir():
        return REAL_DATA
    if os.environ.get("CI"):
        pytest.fail(f"the real data are not in {REAL_DATA}, and CI must not skip what needs them")
    return None


@pytest.fixture(scope="session")
def real_data(real_data_if_present: Path | None) -> Path:
    """Return the folder of the real data; tests that need it are skipped without it, except in CI."""
    if real_data_if_present is None:
        pytest.skip(f"the real data are not in {REAL_DATA}")
    return real_data_if_present


class RedisServer:
    """A real Redis of the test's own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            [*command, "--dir", str(self._folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except ConnectionRefusedError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError("redis-server does not answer")

    def freeze(self) -> None:
        """SIGSTOP: it takes connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Yield a running Redis."""
    if shutil.which("redis-server") is None:
        skip_or_fail("redis-server is not installed")
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def flip_byte() -> Callable[[Path, int], None]:
    """Damages one byte of a file."""

    def flip(path: Path, index: int) -> None:
        content = bytearray(path.read_bytes())
        content[index] ^= 0x10
        path.write_bytes(content)

    return flip
