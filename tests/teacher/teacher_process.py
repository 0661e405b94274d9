"""Run `hyperagent serve teacher` as a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKEN = "a-token"
START_TIMEOUT_S = 120.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def teacher(model: Path, cache: Path, port: int, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "hyperagent", "serve", "teacher", "--port", str(port), "--cache", str(cache)]
    settings = {"HYPERAGENT_TOKEN": TOKEN, "HYPERAGENT_TEACHER_MODEL": str(model), **environment}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}
    ) as process:
        try:
            yield process
        finally:
            process.kill()
