"""Repository in a temporary folder on which the tools of a trajectory act.

The tools must print the same output on every run. Therefore commands get a fixed environment, the folder is displayed
as `/workspace`, and Python writes no bytecode, which would also hide an edit made within a second.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from hyperagent.errors import ConfigError

SHOWN_ROOT = "/workspace"

# `python3` is the current interpreter without the site module, whose import takes half of the startup time.
_PRELUDE = 'python3() { "$PYTHON" -S "$@"; }\n'
_COMMANDS = ("bash", "cat", "grep", "ls", "rm", "sed", "tail")


def require_commands() -> None:
    """Check that the commands of the trajectories are installed.

    Raises:
        ConfigError: commands are missing; the message names them.
    """
    if missing := [command for command in _COMMANDS if shutil.which(command) is None]:
        raise ConfigError(
            f"generating the sample runs {', '.join(missing)}, not found on PATH; install them or give a data file"
        )


class Workspace:
    """A folder of files with a shell and an editor."""

    def __init__(self, root: Path, files: Mapping[str, str]) -> None:
        """Write `files` (text by relative path) to the empty folder `root`."""
        # The temporary folder may be reached through a link, but Python prints the resolved path.
        self._root = root.resolve()
        for name, text in files.items():
            path = self._root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def files(self) -> dict[str, str]:
        """Return the text of every file by path relative to the root, sorted by path."""
        paths = sorted(path for path in self._root.rglob("*") if path.is_file())
        return {path.relative_to(self._root).as_posix(): path.read_text(encoding="utf-8") for path in paths}

    def run(self, command: str) -> tuple[str, int]:
        """Run a bash command and return its output (stderr included) and exit status."""
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self._root),
            "LC_ALL": "C",
            "TZ": "UTC",
            "PYTHON": sys.executable,
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            ["bash", "-c", _PRELUDE + command.replace(SHOWN_ROOT, str(self._root))],
            cwd=self._root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            check=False,
        )
        return done.stdout.replace(str(self._root), SHOWN_ROOT), done.returncode

    def view(self, name: str) -> str:
        """Return a file's lines, numbered as by `cat -n`."""
        lines = (self._root / name).read_text(encoding="utf-8").splitlines()
        return "".join(f"{number:6}\t{line}\n" for number, line in enumerate(lines, start=1))

    def create(self, name: str, text: str) -> None:
        """Write a new file."""
        with (self._root / name).open("x", encoding="utf-8") as file:
            file.write(text)

    def replace(self, name: str, old: str, new: str) -> None:
        """Replace the only occurrence of `old` in a file."""
        path = self._root / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {name}"
        path.write_text(text.replace(old, new), encoding="utf-8")
