"""What the commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as EtaColumn

stderr = Console(stderr=True)


def progress_bars() -> Progress:
    """Progress bars on standard error, each with count, elapsed time, ETA and a `note` field."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        EtaColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=stderr,
    )


def print_result(result: dict[str, Any], *, as_json: bool) -> None:
    """A command's result: JSON for programs, aligned lines for people."""
    if as_json:
        typer.echo(json.dumps(result, indent=2, default=str))
        return
    width = max(len(name) for name in result)
    for name, value in result.items():
        lines = value if isinstance(value, list) else [value]
        for place, line in enumerate(lines):
            typer.echo(f"{name if place == 0 else '':<{width}}  {line}")
