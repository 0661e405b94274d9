"""Report on a data file: render, tokenize, mask and check every row without writing any."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hyperagent.data.chat.messages import Dialogue, dialogue_of, issue_text, name_of, prune_nulls, refused_as
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.columns import NO_REPOSITORY, Row
from hyperagent.data.files.reader import count_rows, read_rows_or_refusals, read_schema_differences
from hyperagent.data.pipeline.parallel import map_rows
from hyperagent.data.pipeline.views import ViewMaker
from hyperagent.data.reports.json_texts import json_texts
from hyperagent.errors import MaskDisagreement, RowRefused
from hyperagent.progress import Progress, no_progress


@dataclass(frozen=True)
class RowReport:
    """Report on one rendered row."""

    trajectory_id: str
    repo: str
    issue: str
    tokens: int
    supervised_tokens: int
    roles: dict[str, tuple[int, int]]
    """Number of messages and of characters, calls included, by role."""
    is_stock: bool
    """Whether the rendered text equals the stock template's rendering of the messages, byte for byte."""
    phantom_parameters: int
    """Number of parameters that the row's tools declare as null and that the rendering shows nevertheless."""
    not_printed: tuple[str, ...] = ()
    """Labels, such as ids of tool calls, that the row holds and the template does not print."""
    not_read: tuple[str, ...] = ()
    """Keys of messages that hold something and are not passed to the template."""


@dataclass(frozen=True)
class FileReport:
    """Report of `inspect_file` on a whole file."""

    rows: int
    rendered: tuple[RowReport, ...]
    refused: tuple[RowRefused, ...]
    schema_differences: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rendered)

    @property
    def supervised_tokens(self) -> int:
        return sum(row.supervised_tokens for row in self.rendered)

    @property
    def mask_disagreements(self) -> int:
        """Number of rows refused because the two masks of the assistant's tokens differ."""
        return sum(refusal.kind is MaskDisagreement for refusal in self.refused)

    @property
    def phantom_parameters(self) -> int:
        return sum(row.phantom_parameters for row in self.rendered)

    @property
    def template_mismatches(self) -> int:
        """Number of rows whose text differs from the stock template's rendering."""
        return sum(not row.is_stock for row in self.rendered)

    @property
    def duplicates(self) -> int:
        """Number of rows whose issue occurred in another repository before; tokenization leaves them out."""
        repo_of_issue: dict[str, str] = {}
        return sum(repo_of_issue.setdefault(row.issue, row.repo) != row.repo for row in self.rendered)

    @property
    def not_printed(self) -> dict[str, int]:
        """Number of rows whose labels of a kind the template does not print, by kind."""
        return dict(Counter(kind for row in self.rendered for kind in row.not_printed))

    @property
    def not_read(self) -> dict[str, int]:
        """Number of rows with a key in their messages that holds something and is not passed to the template, by key."""
        return dict(Counter(key for row in self.rendered for key in row.not_read))

    @property
    def without_repository(self) -> int:
        """Number of rows that name no repository, so that each counts as one of its own."""
        return sum(row.repo.startswith(NO_REPOSITORY) for row in self.rendered)

    def roles(self) -> dict[str, dict[str, int]]:
        """Return the number of messages and characters of all rows, by role."""
        messages: Counter[str] = Counter()
        characters: Counter[str] = Counter()
        for row in self.rendered:
            for role, (num_messages, num_characters) in row.roles.items():
                messages[role] += num_messages
                characters[role] += num_characters
        return {role: {"messages": messages[role], "characters": characters[role]} for role in sorted(messages)}


def inspect_file(
    path: Path,
    tokenizer: ChatTokenizer,
    *,
    strict: bool = False,
    num_workers: int | None = None,
    progress: Progress = no_progress,
) -> FileReport:
    """Render, tokenize, mask and check every row of a file, regardless of its length.

    Args:
        strict: raise at the first row that cannot be used.
        num_workers: number of processes (see `parallel.map_rows`).

    Raises:
        DataError: the file cannot be read.
        ConfigError: the chat template cannot be used.
        RowRefused: in strict mode.
    """
    inspector = RowInspector(ViewMaker(tokenizer))
    differences = tuple(read_schema_differences(path))
    total = count_rows(path)
    rendered: list[RowReport] = []
    refused: list[RowRefused] = []
    names: set[str] = set()
    for done, result in enumerate(
        map_rows(inspector, _numbered(path), num_items=total, num_workers=num_workers), start=1
    ):
        progress(done, total)
        if isinstance(result, RowReport) and result.trajectory_id in names:
            result = RowRefused(result.trajectory_id, f"row {done - 1} has the id of an earlier row")
        if isinstance(result, RowReport):
            names.add(result.trajectory_id)
            rendered.append(result)
        elif strict:
            raise result
        else:
            refused.append(result)
    return FileReport(total, tuple(rendered), tuple(refused), differences)


class NumberedRow(NamedTuple):
    """A row, or its refusal by the reader, with its number from 0."""

    number: int
    row: Row | RowRefused


class RowInspector:
    """Reports on a row, or returns the refusal of a row that cannot be used."""

    def __init__(self, maker: ViewMaker) -> None:
        self._maker = maker

    def __call__(self, numbered: NumberedRow) -> RowReport | RowRefused:
        number, row = numbered
        if isinstance(row, RowRefused):
            return row
        name = name_of(row, number)
        try:
            with refused_as(name):
                return self._report(name, row)
        except RowRefused as refusal:
            return refusal

    def _report(self, name: str, row: Row) -> RowReport:
        dialogue = dialogue_of(row)
        masked = self._maker.masked(dialogue)
        tokenizer = self._maker.tokenizer
        stock = tokenizer.apply_template(dialogue.messages, dialogue.tools, add_generation_prompt=False)
        return RowReport(
            trajectory_id=name,
            repo=row["repo"],
            issue=issue_text(dialogue.task),
            tokens=len(masked.ids),
            supervised_tokens=len(masked.positions),
            roles=_roles(dialogue),
            is_stock=masked.text == stock,
            phantom_parameters=count_phantom_parameters(row["tools"] or [], dialogue, tokenizer),
            not_printed=tuple(tokenizer.printed.lost(dialogue.messages, dialogue.tools)),
            not_read=tuple(sorted(dialogue.not_read)),
        )


def count_phantom_parameters(raw_tools: list[dict[str, Any]], dialogue: Dialogue, tokenizer: ChatTokenizer) -> int:
    """Count the parameters that a tool declares as null and that the template shows nevertheless.

    The rendered text decides: in the text that a tool's parameters add to it, the name of a padded parameter may occur
    no more often than in the tool's own declarations.
    """
    count = 0
    for raw, tool in zip(raw_tools, dialogue.tools, strict=True):
        own = {name: declared for name, declared in _properties(raw).items() if declared is not None}
        padded = _properties(raw).keys() - own.keys()
        if not padded:
            continue
        shown = _render_tool(tokenizer, tool)
        bare = _render_tool(tokenizer, _without_parameters(tool))
        declared = " ".join(json_texts(prune_nulls(own)))
        count += sum(_words(shown, name) - _words(bare, name) > _words(declared, name) for name in padded)
    return count


def _numbered(path: Path) -> Iterator[NumberedRow]:
    return (NumberedRow(number, row) for number, row in enumerate(read_rows_or_refusals(path)))


def _roles(dialogue: Dialogue) -> dict[str, tuple[int, int]]:
    roles: dict[str, tuple[int, int]] = {}
    for message in dialogue.messages:
        messages, characters = roles.get(message["role"], (0, 0))
        calls = sum(len(text) for text in json_texts(message.get("tool_calls", [])))
        roles[message["role"]] = (messages + 1, characters + len(message["content"]) + calls)
    return roles


def _properties(tool: Any) -> dict[str, Any]:
    value = tool
    for key in ("function", "parameters", "properties"):
        # A tool of another structure declares no parameters that could be padded.
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _without_parameters(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    return {**tool, "function": {**function, "parameters": {**function.get("parameters", {}), "properties": {}}}}


def _render_tool(tokenizer: ChatTokenizer, tool: dict[str, Any]) -> str:
    return tokenizer.apply_template([{"role": "user", "content": ""}], [tool], add_generation_prompt=False)


def _words(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text))
