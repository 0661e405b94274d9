"""Options that several `hyperagent data` commands share, and the settings made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Source = Annotated[Path, typer.Argument(help="Trajectories: Parquet, or JSON Lines in a file named *.jsonl.")]
TokenizerFolder = Annotated[Path, typer.Option("--tokenizer", help="Folder with tokenizer.json and the chat template.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; by default one per core if that pays.")]

ResolvedOnly = Annotated[bool, typer.Option("--resolved-only", help="Only trajectories that solved their task.")]
ExitStatus = Annotated[list[str] | None, typer.Option(help="Only this exit status, such as submit; repeatable.")]
Licenses = Annotated[Path | None, typer.Option(help="Parquet or JSON Lines with instance_id and license_name.")]
License = Annotated[list[str] | None, typer.Option(help="Only tasks under this license of --licenses; repeatable.")]
Sample = Annotated[int | None, typer.Option(min=2, help="Take this many rows, drawn by the seed.")]
Seed = Annotated[int, typer.Option(min=0, help="Draws the sample and what is held out.")]
HeldOutShare = Annotated[float, typer.Option(min=0.01, max=0.99, help="Share of repositories to hold out.")]
HeldOutTasksShare = Annotated[
    float, typer.Option(min=0, max=0.99, help="Share of the other repositories' tasks to hold out too.")
]
By = Annotated[
    Literal["hash", "time"], typer.Option(help="Which tasks these are: drawn by a hash, or the newest by issue number.")
]

Condition = Annotated[
    list[str] | None,
    typer.Option(
        help="What the hypernetwork reads: system, tools, task, extra; repeatable. By default the first three."
    ),
]
Internalize = Annotated[
    list[str] | None,
    typer.Option(help="What the student does not see: system, tools, task; repeatable. By default nothing."),
]
Extra = Annotated[Path | None, typer.Option(help="Parquet or JSON Lines with instance_id and text.")]
MaxTokens = Annotated[int, typer.Option(min=2, help="Longest trajectory, in tokens.")]
MaxPromptTokens = Annotated[int, typer.Option(min=1, help="Longest condition, in tokens.")]
Cut = Annotated[bool, typer.Option("--cut", help="Cut a longer trajectory at a message instead of refusing it.")]
