"""Show the teacher held-out trajectories under a foreign condition: hidden parts of another repository's trajectory.

The teacher's rows can depend on the condition only if they change with it. The assistant's turns and everything else
stay, so that supervised positions pair one to one with those of the original tokens file (docs/teacher-check.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hyperagent.config import parse
from hyperagent.data.chat.messages import Dialogue, dialogue_of, name_of, refused_as
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.checked_sample import SampleCondition, SampleSettings, sample_identity
from hyperagent.data.files.reader import count_rows, read_rows_or_refusals
from hyperagent.data.files.shards import fingerprint
from hyperagent.data.files.side_tables import read_joined
from hyperagent.data.files.tokens_file import (
    HELD_OUT,
    TokenizedTrajectory,
    TokensFile,
    TokensWriter,
    read_data_identity,
    write_tokens,
)
from hyperagent.data.files.tokens_rows import TokensRow
from hyperagent.data.pipeline.foreign_draw import Draw, draw_rows
from hyperagent.data.pipeline.views import Condition, Part, ViewMaker, ViewSettings
from hyperagent.errors import ConfigError, DataError, RowRefused, TooLong
from hyperagent.identity import DataIdentity, require_same
from hyperagent.progress import Progress, no_progress


@dataclass(frozen=True)
class ForeignReport:
    """Counts of a sample under a foreign condition."""

    trajectories: int
    repositories: int
    parts: tuple[Part, ...]
    """Parts that were replaced."""
    unchanged: int
    """Number of trajectories whose view stays as it is, since the other repository has the same parts."""
    refused: tuple[RowRefused, ...]
    """Drawn trajectories that were left out, with the reason."""


def foreign_tokens(
    source: Path,
    tokens: Path,
    out: Path,
    tokenizer: ChatTokenizer,
    *,
    rows: int = 64,
    seed: int = 0,
    split: str = HELD_OUT,
    extra: Path | None = None,
    own_out: Path | None = None,
    reading: Progress = no_progress,
    tokenizing: Progress = no_progress,
) -> ForeignReport:
    """Write a tokens file of trajectories that the teacher sees under the condition of another repository.

    The views are made with the settings that `tokens` records. Only the teacher's view differs from `tokens`: names,
    splits, prompts and the student's views are those of the original.

    Args:
        source: data file that `tokens` was made from.
        tokens: tokens file to draw from.
        rows: maximum number of trajectories; repositories take turns.
        seed: seed for drawing the trajectories and the repositories whose parts they get.
        split: split to draw from. The foreign parts come from the same split if it has another repository.
        extra: file with extra texts that `tokens` was made with, if any.
        own_out: also write the drawn trajectories unchanged, so that the teacher need not score all of `tokens`.
        reading: called with (rows read, rows of `source`).
        tokenizing: called with (trajectories done, trajectories drawn).

    Raises:
        DataError: a file cannot be used, no trajectory is left, a supervised token changes with the condition, or no
            view changes: the parts are the same in every repository, so there is nothing to distill.
        IdentityMismatch: `tokens` was made from other files or with another tokenizer.
        ConfigError: the chat template cannot be used, or an output has the name of an input.
        StorageError: a file system operation failed.
    """
    if {path.resolve() for path in (out, own_out) if path} & {source.resolve(), tokens.resolve()}:
        raise ConfigError(f"{out} would replace a file that it is made from; choose another name")
    identity = read_data_identity(tokens)
    _require_inputs(identity, source, tokenizer, extra)
    views = view_settings(identity)
    drawn = draw_rows(tokens, rows=rows, seed=seed, split=split)
    texts = _read_texts(source, drawn, read_joined(extra, "text") if extra else {}, reading)
    rewriter = _Rewriter(ViewMaker(tokenizer), views, texts)
    settings = SampleSettings(rows, seed, split)
    with ExitStack() as files:
        writers = [
            files.enter_context(write_tokens(path, sample_identity(identity, settings, condition=condition)))
            for path, condition in _outputs(out, own_out)
        ]
        return _write(TokensFile(tokens), drawn, rewriter, writers, tokenizing)


def _outputs(out: Path, own_out: Path | None) -> list[tuple[Path, SampleCondition]]:
    foreign: tuple[Path, SampleCondition] = (out, "foreign")
    return [foreign] if own_out is None else [foreign, (own_out, "own")]


def _write(
    tokens: TokensFile, drawn: Sequence[Draw], rewriter: _Rewriter, writers: Sequence[TokensWriter], progress: Progress
) -> ForeignReport:
    """Write every drawn trajectory under its foreign condition to the first file, and as it is to the second, if any.

    Raises:
        DataError: see `foreign_tokens`.
    """
    refused: list[RowRefused] = []
    repos: set[str] = set()
    written = unchanged = 0
    for done, draw in enumerate(drawn, start=1):
        own = tokens.row(draw.row.number)
        try:
            foreign = rewriter.rewrite(own, draw.donors)
        except RowRefused as refusal:
            refused.append(refusal)
            continue
        finally:
            progress(done, len(drawn))
        for writer, trajectory in zip(writers, (foreign, own), strict=False):
            writer.write(trajectory)
        repos.add(own.repo)
        written += 1
        unchanged += np.array_equal(own.token_ids, foreign.token_ids)
    _require_change(written, unchanged, rewriter.parts, refused)
    return ForeignReport(written, len(repos), rewriter.parts, unchanged, tuple(refused))


def view_settings(identity: DataIdentity) -> ViewSettings:
    """Return the settings of the views that the identity of a tokens file records.

    Raises:
        ConfigError: another version recorded settings that this one does not know.
    """
    recorded = dict(identity.settings["views"])
    # The name under which the identity keeps this field.
    recorded["internalized"] = recorded.pop("internalised")
    if "extra" in recorded["condition"]:
        # Where nothing is recorded, the teacher does not see the extra text.
        recorded.setdefault("extra_in_teacher", None)
    return parse(recorded, ViewSettings, source="the view settings of the tokens file")


def replaced_parts(views: ViewSettings) -> tuple[Part, ...]:
    """Return the parts of the condition that the teacher sees and the student does not.

    If there are none, these are all parts except the task, or the task if the teacher sees no other part.
    """
    seen = [part for part in views.condition if part != "extra" or views.extra_in_teacher]
    hidden = {*views.internalized, *({"extra"} & set(seen))}
    chosen = hidden or set(seen) - {"task"} or {"task"}
    return tuple(part for part in seen if part in chosen)


def with_foreign_parts(dialogue: Dialogue, donor: Condition, parts: Sequence[Part]) -> Dialogue:
    """Return `dialogue` with the system prompt, tools and task of `donor`, as far as they are in `parts`."""
    messages = list(dialogue.messages)
    if "task" in parts:
        messages[dialogue.task_index] = {"role": "user", "content": donor.task}
    if "system" in parts:
        messages = messages[dialogue.system is not None :]
        if donor.system is not None:
            messages.insert(0, {"role": "system", "content": donor.system})
    tools = [dict(tool) for tool in donor.tools] if "tools" in parts else dialogue.tools
    return replace(dialogue, messages=messages, tools=tools)


@dataclass(frozen=True)
class _Texts:
    """Texts of the data file, by trajectory id."""

    dialogues: Mapping[str, Dialogue]
    conditions: Mapping[str, Condition]


class _Rewriter:
    """Makes the teacher's view of trajectories under a foreign condition."""

    def __init__(self, maker: ViewMaker, views: ViewSettings, texts: _Texts) -> None:
        self.parts = replaced_parts(views)
        self._maker = maker
        self._max_tokens = views.max_tokens
        # Room for foreign parts: the original's turns are all needed, and the limit is applied to them alone.
        room = views.max_tokens + 2 * views.max_prompt_tokens
        self._views = views.model_copy(update={"max_tokens": room, "max_prompt_tokens": room, "cut": True})
        self._texts = texts

    def rewrite(self, own: TokenizedTrajectory, donors: Sequence[TokensRow]) -> TokenizedTrajectory:
        """Return the trajectory under the first donor's condition with which it is within the limit of tokens.

        Raises:
            RowRefused: it is with none of them.
            DataError: a supervised token changes with the condition.
        """
        name = own.trajectory_id
        dialogue = self._texts.dialogues[name]
        for donor in donors:
            condition = self._texts.conditions[donor.trajectory_id]
            with refused_as(name):
                view = self._maker.make(
                    name,
                    own.repo,
                    own.split,
                    with_foreign_parts(dialogue, condition, self.parts),
                    settings=self._views,
                    extra=condition.extra,
                )
            foreign = _first_rows(view, own)
            if len(foreign.token_ids) <= self._max_tokens:
                return foreign
        raise RowRefused(
            name,
            f"it has more than {self._max_tokens} tokens with the {' and '.join(self.parts)} of each of "
            f"{len(donors)} other repositories",
            TooLong,
        )


def _first_rows(view: TokenizedTrajectory, own: TokenizedTrajectory) -> TokenizedTrajectory:
    """Return `own` with the teacher's view `view`, which ends where `own` does.

    Raises:
        DataError: the supervised tokens of the two differ.
    """
    positions = view.positions[: len(own.positions)]
    wanted, found = own.token_ids[own.positions], view.token_ids[positions]
    if not np.array_equal(wanted, found):
        raise DataError(
            f"trajectory {own.trajectory_id!r}: its supervised tokens differ under a foreign condition "
            f"({len(wanted)} and {len(found)} of them), so its rows cannot be compared; use a chat template that "
            "writes the assistant's turns independently of system prompt, tools and task"
        )
    # What follows the last supervised token depends on where a long trajectory was cut.
    end = len(own.token_ids) - int(own.positions[-1]) + int(positions[-1])
    return replace(own, token_ids=view.token_ids[:end], positions=positions)


def _require_inputs(identity: DataIdentity, source: Path, tokenizer: ChatTokenizer, extra: Path | None) -> None:
    require_same(
        "the tokenizer of the tokens file",
        expected=tokenizer.identity,
        found=identity.tokenizer,
        remedy="give the tokenizer folder that the file was tokenized with",
    )
    recorded: list[tuple[str, Path | None, Any]] = [
        ("the data file", source, identity.source),
        ("the file with extra texts", extra, identity.settings.get("extra_file")),
    ]
    for what, path, expected in recorded:
        require_same(
            f"the fingerprint of {what}",
            expected=expected,
            found=fingerprint(path) if path else None,
            remedy="give the file that the tokens file was made with",
        )


def _read_texts(source: Path, drawn: Sequence[Draw], extra_of: Mapping[str, str], progress: Progress) -> _Texts:
    """Read the dialogues of the drawn trajectories and the conditions of their donors, in one pass over the file."""
    wanted = {draw.row.trajectory_id for draw in drawn}
    donors = {donor.trajectory_id for draw in drawn for donor in draw.donors}
    dialogues: dict[str, Dialogue] = {}
    conditions: dict[str, Condition] = {}
    seen: set[str] = set()
    total = count_rows(source)
    for number, row in enumerate(read_rows_or_refusals(source)):
        progress(number + 1, total)
        if isinstance(row, RowRefused):
            continue
        name = name_of(row, number)
        if name in seen or name not in wanted | donors:
            continue
        try:
            with refused_as(name):
                dialogue = dialogue_of(row)
        except RowRefused:
            # A later row with the id of an unusable one was tokenized.
            continue
        seen.add(name)
        if name in wanted:
            dialogues[name] = dialogue
        if name in donors:
            extra = extra_of.get(str(row["instance_id"] or ""))
            conditions[name] = Condition(dialogue.task, dialogue.system, dialogue.tools, extra)
    return _Texts(dialogues, conditions)


def _require_change(written: int, unchanged: int, parts: Sequence[Part], refused: Sequence[RowRefused]) -> None:
    if not written:
        raise DataError(f"no trajectory is left for the teacher check; the first refusal: {refused[0]}")
    if unchanged == written:
        raise DataError(
            f"the hidden parts ({', '.join(parts)}) are the same in every repository: none of the {written} drawn "
            "views of the teacher changes with them, so there is nothing to distill; choose a condition that varies by "
            "repository"
        )
