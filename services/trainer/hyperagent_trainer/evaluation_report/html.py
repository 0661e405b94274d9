"""Write the report as one self-contained HTML page: inline style and SVG, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from hyperagent.storage.files import write_atomically
from hyperagent_trainer.evaluation.verdict import HARMFUL, PAYS, STATIC_SUFFICES
from hyperagent_trainer.evaluation_report.blocks import Block, Paragraph, Quote, Section, Table, Terms
from hyperagent_trainer.evaluation_report.content import content
from hyperagent_trainer.evaluation_report.markup import Markup, element, join
from hyperagent_trainer.evaluation_report.schema import EvaluationReport

_TONES = {PAYS: "good", STATIC_SUFFICES: "wait", HARMFUL: "bad"}
# The browser enforces that the page loads and runs nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_html(path: Path, report: EvaluationReport) -> None:
    """Write the report as an HTML page.

    Raises:
        StorageError: a file system operation failed; `path` is unchanged.
    """
    said = content(report)
    tone = _TONES.get(report.conditioning.verdict or "", "open")
    style = (files("hyperagent_trainer.evaluation_report") / "page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", said.title),
        element("style", Markup(style)),
    )
    body = element(
        "body",
        element(
            "header",
            element("h1", said.title),
            element(
                "div",
                element("p", said.verdict, class_="verdict"),
                element("p", said.numbers),
                element("p", said.reason, class_="faint"),
                class_=f"card {tone}",
            ),
            element("p", said.introduction),
        ),
        element("main", *(_section(section) for section in said.sections)),
    )
    page = join(Markup("<!doctype html>\n"), element("html", head, body, lang="en"), Markup("\n"))
    write_atomically(path, page.encode())


def _section(section: Section) -> Markup:
    return element("section", element("h2", section.title), *(_block(block) for block in section.blocks))


def _block(block: Block) -> Markup:
    if isinstance(block, Paragraph):
        return element("p", block.text, class_="warning") if block.is_warning else element("p", block.text)
    if isinstance(block, Terms):
        items = (join(element("dt", term), element("dd", meaning)) for term, meaning in block.items)
        return element("dl", *items)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Quote):
        return _quote(block)
    return join(block.content, element("p", block.note))


def _table(table: Table) -> Markup:
    head = element("tr", *(element("th", cell, scope="col") for cell in table.head))
    rows = (
        element("tr", element("th", cells[0], scope="row"), *(element("td", cell) for cell in cells[1:]))
        for cells in table.rows
    )
    body = join(element("thead", head), element("tbody", *rows))
    if not table.is_folded:
        return _scrolled(element("table", element("caption", table.caption), body), table.caption)
    folded = _scrolled(element("table", body), table.caption)
    return element("details", element("summary", f"{table.caption}, as a table"), folded)


def _scrolled(table: Markup, name: str) -> Markup:
    # A wide table scrolls by itself, with the keyboard too, so that the page does not.
    return element("div", table, class_="scrolled", tabindex="0", role="region", aria_label=name)


def _quote(quote: Quote) -> Markup:
    marked = sorted({part for part in quote.marked if part}, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, marked))})", quote.text) if marked else [quote.text]
    # Split with one group: every second piece is a marked one. HTML drops the line break at the start of a pre.
    text = (element("mark", piece) if number % 2 else piece for number, piece in enumerate(pieces))
    return join(
        element("h3", quote.title), element("pre", "\n", *text, tabindex="0", role="region", aria_label=quote.title)
    )
