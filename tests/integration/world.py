"""Types of the fixtures of these tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class World:
    """Paths of all inputs."""

    root: Path
    sample: Path
    tokenizer: Path
    tokens: Path
    teacher: Path
    student: Path


Run = Callable[..., "subprocess.CompletedProcess[str]"]
"""Function that runs one `hyperagent` command to completion."""
Start = Callable[..., "subprocess.Popen[bytes]"]
"""Function that starts one `hyperagent` command."""


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the error line, which progress bars may precede."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == lines[0]
    return lines[0]
