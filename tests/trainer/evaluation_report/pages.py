"""Write a report and read it back the way a browser would: elements, text, plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hyperagent_trainer.evaluation_report.html import write_html
from hyperagent_trainer.evaluation_report.markdown import write_markdown
from hyperagent_trainer.evaluation_report.schema import EvaluationReport

VOID = {"meta"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    inside: tuple[str, ...]
    """Ids and classes of the elements around it."""
    text: str = ""
    """Its own text and that of the elements inside."""


@dataclass
class Page(HTMLParser):
    """All elements of a page in document order; the parser refuses tags that are not balanced."""

    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[Element] = []
        self.declarations: list[str] = []

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        assert len(attributes) == len(attrs), f"an attribute of <{tag}> is given twice"
        inside = tuple(
            name for one in self.open for key in ("id", "class") for name in one.attributes.get(key, "").split()
        )
        element = Element(tag, attributes, inside)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str, *, inside: str = "", class_: str = "") -> list[Element]:
        return [
            element
            for element in self.elements
            if element.tag == tag
            and (not inside or inside in element.inside)
            and (not class_ or class_ in element.attributes.get("class", "").split())
        ]


def page_of(value: dict[str, Any], folder: Path) -> Page:
    """Write the page of a report and parse it."""
    path = folder / "report" / "evaluation.html"
    write_html(path, EvaluationReport.model_validate(value))
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def markdown_of(value: dict[str, Any], folder: Path) -> str:
    """Write the Markdown of a report and return it."""
    path = folder / "report" / "evaluation.md"
    write_markdown(path, EvaluationReport.model_validate(value))
    return path.read_text(encoding="utf-8")


def coordinate(element: Element, name: str) -> float:
    """Return a coordinate in percent of the width, or in pixels."""
    return float(element.attributes[name].removesuffix("%"))
