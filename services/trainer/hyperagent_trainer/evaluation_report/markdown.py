"""Write the report as Markdown; plots are left out, since a table has the same numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hyperagent.storage.files import write_atomically
from hyperagent_trainer.evaluation_report.blocks import Figure, Paragraph, Quote, Section, Table, Terms
from hyperagent_trainer.evaluation_report.content import content
from hyperagent_trainer.evaluation_report.markup import printable
from hyperagent_trainer.evaluation_report.schema import EvaluationReport

_Written = Paragraph | Terms | Table | Quote
# What CommonMark and its tables give a meaning inside a line.
_SPECIAL = re.compile(r"[\\`*_\[\]<>|~&#]")


def write_markdown(path: Path, report: EvaluationReport) -> None:
    """Write the report as a Markdown file.

    Raises:
        StorageError: a file system operation failed; `path` is unchanged.
    """
    said = content(report)
    parts = [
        f"# {_plain(said.title)}",
        f"**{_plain(said.verdict)}**",
        *(_plain(text) for text in (said.numbers, said.reason, said.introduction)),
        *(_section(section) for section in said.sections if _without_figures(section)),
    ]
    write_atomically(path, ("\n\n".join(parts) + "\n").encode())


def _section(section: Section) -> str:
    return "\n\n".join((f"## {_plain(section.title)}", *(_block(block) for block in _without_figures(section))))


def _without_figures(section: Section) -> list[_Written]:
    return [block for block in section.blocks if not isinstance(block, Figure)]


def _block(block: _Written) -> str:
    if isinstance(block, Paragraph):
        return f"**{_plain(block.text)}**" if block.is_warning else _plain(block.text)
    if isinstance(block, Terms):
        return "\n".join(f"- **{_plain(term)}**: {_plain(meaning)}" for term, meaning in block.items)
    if isinstance(block, Table):
        return _table(block)
    return _quote(block)


def _table(table: Table) -> str:
    ruler = ("---", *("---:" for _ in table.head[1:]))
    lines = [_line([_plain(cell) for cell in cells]) for cells in (table.head, *table.rows)]
    return "\n".join((f"{_plain(table.caption)}:\n", lines[0], _line(ruler), *lines[1:]))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _quote(quote: Quote) -> str:
    text = printable(quote.text)
    # A fence that is longer than any run of backticks inside cannot be closed by the text.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{_plain(quote.title)}:\n\n{fence}text\n{text}\n{fence}"


def _plain(text: str) -> str:
    """Return plain text as Markdown of one line that shows exactly its words."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(printable(text).split()))
