"""The demo's folder: what a former demo wrote there is kept, and what anybody else wrote stays where it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from hyperagent.errors import ConfigError

MARKER = "demo.json"
"""File by which a demo's folder is recognized; it holds the configuration."""

PREVIOUS = "previous"
_SHARED = "adapters"
"""Store of the adapter service. It has a folder for each bundle, and may hold adapters that were made by hand."""

_WRITTEN = frozenset(
    {
        MARKER, "sample.parquet", "tokenizer", "tokens.parquet", "teacher", "student", "cache", "recipes", "runs", "controls",
        "bundle", "example", "adapter", "other-adapter", "logs", "report.json", "report.png",
        "foreign.parquet", "foreign-cache", "evaluation.json", "evaluation.md", "evaluation.html", "teacher_check.json", "dependent_rows.parquet",
    }
)  # fmt: skip


def require_demo_folder(out: Path) -> None:
    """Require that a folder is empty, missing, or a former demo's.

    Raises:
        ConfigError: it holds other files.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ConfigError(f"{out} holds other files than a demo's; choose another --out")


@contextmanager
def temporary_folder(*, beside: Path) -> Iterator[Path]:
    """Yield a folder on the same file system as `beside`, which is removed afterwards."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}-", dir=beside.parent) as place:
        yield Path(place)


def keep_former_results(out: Path) -> None:
    """Move what a former demo wrote to `previous/TIME`; everything else, and the store of adapters, stays in place."""
    if not out.is_dir():
        out.mkdir(parents=True)
        return
    former = [path for path in out.iterdir() if path.name in _WRITTEN]
    if not former:
        return
    kept = out / PREVIOUS / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    kept.mkdir(parents=True)
    for path in former:
        target = kept / path.name
        if path.is_symlink():  # to a model; relative to the folder, from which it moves away
            target.symlink_to(os.path.relpath(path.resolve(), kept))
            path.unlink()
        else:
            path.rename(target)


def move_into(out: Path, place: Path) -> None:
    """Move everything in the folder `place` to the folder `out`."""
    for path in place.iterdir():
        shutil.move(path, out / path.name)
