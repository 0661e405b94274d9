"""The processes of the demo: started, waited for, and always stopped again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from hyperagent.errors import ServiceError

_READY_TIMEOUT_S = 120.0
_ASK_S = 2.0
_STOP_GRACE_S = 20.0
_SAMPLE_INTERVAL_S = 0.25


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServiceProcess:
    """A running `hyperagent serve NAME`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self._name = name
        self._process = process
        self._log = log

    def require_alive(self) -> None:
        """Raise `ServiceError`, with the log's last line, once the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServiceError(
                f"the {self._name} service ended with code {code}: {_last_line(self._log)}; see {self._log}"
            )

    def wait_until_ready(self, ask: Callable[[float], None]) -> None:
        """Return as soon as `ask`, which raises `ServiceError` after the seconds it is given, does not.

        Raises:
            ServiceError: the process has ended, or is not ready in time.
        """
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while True:
            try:
                return ask(_ASK_S)
            except ServiceError:
                self.require_alive()
                if time.monotonic() > deadline:
                    raise


@contextmanager
def service(
    name: str, arguments: Sequence[str], *, log: Path, token: str, threads: int | None = None
) -> Iterator[ServiceProcess]:
    """Run `hyperagent serve NAME ...` within the block; it ends with SIGTERM, or SIGKILL if it does not stop in time.

    Args:
        threads: number of CPU threads of the service and the processes that it starts; by default torch decides.
    """
    command = [sys.executable, "-m", "hyperagent", "serve", name, *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "HYPERAGENT_TOKEN": token,
                **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
            },
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops its services in order
        )

    try:
        yield ServiceProcess(name, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_command(
    arguments: Sequence[str], *, log: Path, accepted: Sequence[int] = (0,), threads: int | None = None
) -> int:
    """Run `hyperagent ARGUMENTS` to its end and return its exit status; its output goes to `log`.

    Args:
        threads: number of torch's threads; by default torch decides.

    Raises:
        ServiceError: the status is not `accepted`; the message names the log and its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "hyperagent", *arguments],
            env=None if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode not in accepted:
        raise ServiceError(f"hyperagent {arguments[0]} ended with code {done.returncode}: {_last_line(log)}; see {log}")
    return done.returncode


def run_worker(
    module: str,
    job: Path,
    *,
    log: Path,
    threads: int,
    on_line: Callable[[dict[str, Any]], None] = lambda _line: None,
) -> dict[str, Any]:
    """Run `python -m MODULE JOB` to its end, following the JSON lines it prints; returns the last one.

    Raises:
        ServiceError: it failed; names the log and its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: dict[str, Any] = {}
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-m", module, str(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                last = json.loads(line)
                on_line(last)
            code = process.wait()
        finally:
            process.kill()
    if code != 0:
        raise ServiceError(f"{module} ended with code {code}: {_last_line(log)}; see {log}")
    return last


class PeakMemory:
    """The largest resident memory of this process and all its children; a context manager.

    A sum over processes counts pages that they share once for each, so it is an upper bound.
    """

    def __enter__(self) -> PeakMemory:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._done.wait(_SAMPLE_INTERVAL_S):
            total = 0
            for process in [this, *this.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
