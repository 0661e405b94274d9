"""`hyperagent teacher-check`: find out whether the teacher uses the condition before anything is distilled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperagent.cli.data_options import Extra, Json, Source, TokenizerFolder
from hyperagent.cli.display import add_bar, print_result, progress_bars, refusals

if TYPE_CHECKING:
    from hyperagent.teacher_check.verdict import TeacherCheck

app = typer.Typer(help="Check whether the teacher uses the condition at all.", no_args_is_help=True)

_Tokens = Annotated[Path, typer.Option("--tokens", help="Tokens file, made by `hyperagent data tokenize`.")]


@app.command()
def tokens(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Tokens file to write.")],
    tokens: _Tokens,
    tokenizer: TokenizerFolder,
    extra: Extra = None,
    own_out: Annotated[
        Path | None,
        typer.Option("--own", help="Also write the drawn trajectories unchanged, to score them alone at first."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Maximum number of trajectories; repositories take turns.")] = 64,
    split: Annotated[str, typer.Option(help="Split to draw trajectories from.")] = "held_out",
    seed: Annotated[int, typer.Option(min=0, help="Seed for drawing trajectories and foreign conditions.")] = 0,
    as_json: Json = False,
) -> None:
    """Write held-out trajectories with the hidden parts of another repository, for the teacher to score.

    The views are made as in the tokens file, with the settings that it records.
    """
    from hyperagent.data.chat.tokenizer import ChatTokenizer
    from hyperagent.data.pipeline.foreign import foreign_tokens

    with progress_bars() as bars:
        report = foreign_tokens(
            source,
            tokens,
            out,
            ChatTokenizer(tokenizer),
            rows=rows,
            seed=seed,
            split=split,
            extra=extra,
            own_out=own_out,
            reading=add_bar(bars, "reading"),
            tokenizing=add_bar(bars, "tokenizing"),
        )
    print_result(
        {
            "tokens_file": str(out),
            "trajectories": report.trajectories,
            "repositories": report.repositories,
            "replaced": list(report.parts) if as_json else ", ".join(report.parts),
            "unchanged": report.unchanged,
            "refused": refusals(report.refused, as_json=as_json),
        },
        as_json=as_json,
    )


@app.command()
def compare(
    tokens: _Tokens,
    cache: Annotated[str, typer.Option("--cache", help="Cache of the tokens file: a folder or a URL.")],
    foreign_tokens: Annotated[
        Path, typer.Option("--foreign-tokens", help="Tokens file, made by `hyperagent teacher-check tokens`.")
    ],
    foreign_cache: Annotated[
        str, typer.Option("--foreign-cache", help="Cache of the foreign tokens file; may be the same one.")
    ],
    threshold: Annotated[float, typer.Option(min=0, help="KL in nats above which a row is dependent.")] = 0.1,
    least_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of dependent rows below which there is nothing to distill.")
    ] = 0.01,
    out: Annotated[
        Path | None, typer.Option(help="File to write (Parquet): which rows of each trajectory are dependent.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the teacher's rows under own and foreign condition; exit with 1 if there is nothing to distill."""
    from hyperagent.data.files.tokens_file import read_data_identity
    from hyperagent.teacher_check.compare import compare_caches
    from hyperagent.teacher_check.dependent_rows import write_dependent_rows
    from hyperagent.teacher_check.verdict import check_teacher, dependent_rows

    with progress_bars() as bars:
        compared = compare_caches(
            tokens,
            cache,
            foreign_tokens,
            foreign_cache,
            progress=add_bar(bars, "comparing", unit="trajectories"),
        )
    check = check_teacher(compared, threshold=threshold, least_dependent_share=least_share)
    if out is not None:
        found = dependent_rows(compared, threshold=threshold)
        write_dependent_rows(out, found, data=read_data_identity(tokens), threshold=threshold)
    print_result(check.to_json() if as_json else _as_text(check), as_json=as_json)
    if check.nothing_to_distill:
        raise typer.Exit(1)


def _as_text(check: TeacherCheck) -> dict[str, Any]:
    result = check.to_json()
    for figures in (result, *result["repositories"].values()):
        for name in ("kl", "own_nll", "foreign_nll"):
            figures[name] = f"{figures[name]:.3f} nats"
        figures["dependent_share"] = f"{figures['dependent_share']:.1%}"
    return {**result, "nothing_to_distill": "yes" if check.nothing_to_distill else "no"}
