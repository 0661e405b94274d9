"""`hyperagent data`: from trajectories to token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hyperagent.cli.display import print_result, progress_bars

app = typer.Typer(help="Turn trajectories into token ids.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Turn trajectories into token ids."""


@app.command()
def tokenize(
    source: Annotated[Path, typer.Argument(help="Parquet file in the schema of SWE-rebench-openhands-trajectories.")],
    target: Annotated[Path, typer.Argument(help="Tokens file to write.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json and the chat template.")],
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest trajectory, in tokens.")] = 131_072,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest task prompt, in tokens.")] = 32_768,
    cut: Annotated[
        bool, typer.Option("--cut", help="Cut a longer trajectory at a message instead of refusing it.")
    ] = False,
    sample: Annotated[int | None, typer.Option(min=2, help="Take this many rows, drawn by the seed.")] = None,
    held_out_share: Annotated[float, typer.Option(min=0.01, max=0.99, help="Share of repositories to hold out.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Draws the sample and the held-out repositories.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Tokenise trajectories once; the teacher and the trainer both read the file this writes."""
    from hyperagent.data.tokenise import tokenise_file
    from hyperagent.data.tokenizer import ChatTokenizer

    with progress_bars() as bars:
        task = bars.add_task("tokenising", total=None, note="")
        report = tokenise_file(
            source,
            target,
            ChatTokenizer(tokenizer),
            max_tokens=max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            cut=cut,
            sample=sample,
            held_out_share=held_out_share,
            seed=seed,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    print_result(
        {
            "tokens_file": str(target),
            "rows": report.rows,
            "chosen": report.chosen,
            "train": report.train,
            "held_out": report.held_out,
            "tokens": report.tokens,
            "supervised_tokens": report.supervised_tokens,
            "refused": [str(refusal) for refusal in report.refused],
        },
        as_json=as_json,
    )
