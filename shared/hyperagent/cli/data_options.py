"""Options that several `hyperagent data` commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Source = Annotated[
    Path, typer.Argument(help="Trajectories: *.parquet, *.jsonl or *.ndjson, also *.gz or *.zst; or a folder of them.")
]
TokenizerFolder = Annotated[Path, typer.Option("--tokenizer", help="Folder with tokenizer.json and the chat template.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Number of processes; default: one per core if the input is large enough.")
]

ResolvedOnly = Annotated[bool, typer.Option("--resolved-only", help="Use only trajectories that solved their task.")]
ExitStatus = Annotated[list[str] | None, typer.Option(help="Use only this exit status, such as submit; repeatable.")]
Licenses = Annotated[Path | None, typer.Option(help="Parquet or JSON Lines with instance_id and license_name.")]
License = Annotated[
    list[str] | None, typer.Option(help="Use only tasks with this license (see --licenses); repeatable.")
]
Sample = Annotated[int | None, typer.Option(min=2, help="Sample this many rows with the seed.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed for the sample and the held-out split.")]
HeldOutShare = Annotated[float, typer.Option(min=0.01, max=0.99, help="Share of repositories to hold out.")]
HeldOutTasksShare = Annotated[
    float, typer.Option(min=0, max=0.99, help="Share of the remaining repositories' tasks to hold out.")
]
ValidationShare = Annotated[
    float, typer.Option(min=0, max=0.98, help="Share of repositories that choose the checkpoint; none held out.")
]
By = Annotated[
    Literal["hash", "time"], typer.Option(help="How to choose these tasks: by a hash, or the newest by issue number.")
]

Condition = Annotated[
    list[str] | None,
    typer.Option(
        help="Parts the hypernetwork reads: system, tools, task, extra; repeatable. Default: the first three."
    ),
]
Internalize = Annotated[
    list[str] | None,
    typer.Option(help="Parts hidden from the student: system, tools, task; repeatable. Default: none."),
]
Extra = Annotated[Path | None, typer.Option(help="Extra texts: Parquet or JSON Lines with instance_id and text.")]
ExtraInTeacher = Annotated[
    Literal["system", "task", "none"],
    typer.Option(
        help="Where the teacher sees the extra text: at the end of the system prompt (before the task if there is "
        "none), after the task, or nowhere. The student never sees it."
    ),
]
MaxTokens = Annotated[int, typer.Option(min=2, help="Maximum trajectory length in tokens.")]
MaxPromptTokens = Annotated[int, typer.Option(min=1, help="Maximum condition length in tokens.")]
Cut = Annotated[bool, typer.Option("--cut", help="Truncate longer trajectories at a message instead of refusing them.")]


def view_options(
    condition: list[str] | None, internalize: list[str] | None, extra_in_teacher: str, **limits: Any
) -> dict[str, Any]:
    """Return the fields of `ViewSettings`, which `hyperagent.config.parse` checks."""
    chosen = {
        "internalized": internalize or (),
        "extra_in_teacher": None if extra_in_teacher == "none" else extra_in_teacher,
        **limits,
    }
    return chosen | ({"condition": condition} if condition else {})
