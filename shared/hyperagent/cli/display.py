"""Output of the commands: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from hyperagent.errors import RowRefused
from hyperagent.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

stderr = Console(stderr=True)


def progress_bars() -> Bars:
    """Return progress bars on standard error, each with count, elapsed time, ETA and a `note` field."""
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.progress import TimeRemainingColumn as EtaColumn

    return Bars(
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


def add_bar(bars: Bars, description: str, *, unit: str = "") -> Progress:
    """Add a bar and return the function that advances it; `unit` is the name of the counted items."""
    task = bars.add_task(description, total=None, note=unit)

    def update(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total)

    return update


def print_result(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a command's result, as JSON for programs or as aligned lines for people."""
    if as_json:
        typer.echo(json.dumps(result, indent=2, default=str))
        return
    width = max(len(name) for name in result)
    for name, value in result.items():
        lines = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            lines = [f"{key}: {_flat(item)}" for key, item in value.items()]
        for place, line in enumerate(lines):
            typer.echo(f"{name if place == 0 else '':<{width}}  {line}")


def refusals(refused: Iterable[RowRefused], *, as_json: bool) -> list[Any]:
    """Format refused rows for `print_result`: an object for each for programs, a line for each reason for people."""
    if as_json:
        return [{"trajectory_id": refusal.trajectory_id, "reason": refusal.reason} for refusal in refused]
    groups: dict[str, list[RowRefused]] = {}
    for refusal in refused:
        groups.setdefault(re.sub(r"\d[\d,]*", "N", refusal.reason), []).append(refusal)
    found = sorted(groups.values(), key=len, reverse=True)
    return [str(group[0]) if len(group) == 1 else f"{len(group)} rows, such as {group[0]}" for group in found]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
