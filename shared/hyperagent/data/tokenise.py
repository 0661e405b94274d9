"""A data file to a tokens file: choose rows, split by repository, tokenise, count what was refused and why."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hyperagent.data.reader import Row, read_rows
from hyperagent.data.render import tokenise_row
from hyperagent.data.split import assign_splits
from hyperagent.data.tokenizer import ChatTokenizer
from hyperagent.data.tokens import HELD_OUT, TRAIN, TokenisedTrajectory, write_tokens
from hyperagent.errors import DataError, RowRefused


@dataclass(frozen=True)
class TokeniseReport:
    """What became of a data file."""

    rows: int
    """Rows in the file."""
    chosen: int
    """Rows looked at, when only a sample was asked for."""
    train: int
    held_out: int
    tokens: int
    supervised_tokens: int
    refused: tuple[RowRefused, ...]


def tokenise_file(
    source: Path,
    target: Path,
    tokenizer: ChatTokenizer,
    *,
    max_tokens: int,
    max_prompt_tokens: int,
    cut: bool = False,
    sample: int | None = None,
    held_out_share: float = 0.2,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> TokeniseReport:
    """Tokenise `source` (Parquet trajectories) into `target` (a tokens file), whole or not at all.

    A row that cannot be used is left out and named in the report.

    Args:
        cut: shorten a trajectory at a message boundary instead of refusing it.
        sample: tokenise this many rows, drawn by `seed`, instead of all.
        progress: called with (rows done, rows to do).

    Raises:
        DataError: the file is unusable, or no row of one of the two splits is left.
        StorageError: the file system refused.
    """
    ids_and_repos = [(str(row["trajectory_id"]), str(row["repo"])) for row in read_rows(source)]
    _refuse_duplicates(source, [trajectory_id for trajectory_id, _ in ids_and_repos])
    chosen = set(range(len(ids_and_repos)))
    if sample is not None and sample < len(ids_and_repos):
        chosen = set(random.Random(seed).sample(range(len(ids_and_repos)), sample))
    splits = assign_splits({ids_and_repos[index][1] for index in chosen}, held_out_share=held_out_share, seed=seed)

    kept: list[TokenisedTrajectory] = []
    refused: list[RowRefused] = []
    for done, row in enumerate(_pick(read_rows(source), chosen)):
        progress(done, len(chosen))
        try:
            kept.append(
                tokenise_row(
                    row,
                    tokenizer,
                    split=splits[str(row["repo"])],
                    max_tokens=max_tokens,
                    max_prompt_tokens=max_prompt_tokens,
                    cut=cut,
                )
            )
        except RowRefused as error:
            refused.append(error)
    progress(len(chosen), len(chosen))

    counts = {split: sum(t.split == split for t in kept) for split in (TRAIN, HELD_OUT)}
    for split, count in counts.items():
        if count == 0:
            why = f"; the first refusal: {refused[0]}" if refused else ""
            raise DataError(
                f"no usable trajectory of {source} is left in the {split} split ({len(refused)} of {len(chosen)} refused){why}"
            )
    write_tokens(target, kept, tokenizer.identity)
    return TokeniseReport(
        rows=len(ids_and_repos),
        chosen=len(chosen),
        train=counts[TRAIN],
        held_out=counts[HELD_OUT],
        tokens=sum(len(t.token_ids) for t in kept),
        supervised_tokens=sum(len(t.positions) for t in kept),
        refused=tuple(refused),
    )


def _pick(rows: Iterable[Row], chosen: set[int]) -> Iterable[Row]:
    return (row for index, row in enumerate(rows) if index in chosen)


def _refuse_duplicates(source: Path, trajectory_ids: list[str]) -> None:
    seen: set[str] = set()
    for trajectory_id in trajectory_ids:
        if trajectory_id in seen:
            raise DataError(f"{source} has trajectory {trajectory_id!r} more than once; remove the duplicates")
        seen.add(trajectory_id)
