"""What a report consists of, before it becomes Markdown or HTML. All text is plain: each writer escapes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hyperagent_trainer.evaluation_report.markup import Markup


@dataclass(frozen=True)
class Paragraph:
    """One paragraph."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Terms:
    """Terms and what each one means."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows; the other cells are numbers or short words."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_folded: bool = False
    """Whether the page shows it only on demand, because a figure shows the same."""


@dataclass(frozen=True)
class Figure:
    """A plot; Markdown leaves it out, so a table has the same numbers."""

    content: Markup
    note: str
    """How to read the plot."""


@dataclass(frozen=True)
class Quote:
    """A model's text, word for word."""

    title: str
    text: str
    marked: Sequence[str] = ()
    """Parts of the text that are shown in a mark."""


Block = Paragraph | Terms | Table | Figure | Quote


@dataclass(frozen=True)
class Section:
    """A titled part of the report."""

    title: str
    blocks: Sequence[Block]
