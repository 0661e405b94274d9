"""What the fixtures of these tests hand out."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class World:
    """Where everything is."""

    root: Path
    sample: Path
    tokenizer: Path
    tokens: Path
    teacher: Path
    student: Path


Run = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs one `hyperagent` command to its end."""
Start = Callable[..., "subprocess.Popen[bytes]"]
"""Starts one `hyperagent` command."""


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error line; progress bars may stand before it."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == lines[0]
    return lines[0]
