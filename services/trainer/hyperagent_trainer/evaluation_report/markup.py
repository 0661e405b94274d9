"""Build HTML and SVG from elements, so that no foreign text becomes markup.

A `Markup` is text that is HTML already. `element` escapes every other string, so a name such as `<script>` appears on the page
as its characters.
"""

from __future__ import annotations

import html
import re

# HTML allows no control characters except whitespace, not even as references.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_VOID = {"meta"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def printable(text: str) -> str:
    """Return the text with every control character except tab and newline replaced."""
    return _CONTROL.sub("\ufffd", text)


def element(tag: str, *children: str, **attributes: str | float) -> Markup:
    """Return an element with its children; each one that is no `Markup` is escaped.

    Args:
        attributes: values by name. An underscore in a name stands for a hyphen, and one at its end is left out, as in
            `class_` and `fill_opacity`. Values are escaped.
    """
    written = "".join(f' {_name(name)}="{escape(str(value))}"' for name, value in attributes.items())
    if tag in _VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    """Return the children one after another; each one that is no `Markup` is escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def escape(text: str) -> Markup:
    """Return plain text as HTML that shows exactly its characters."""
    return Markup(html.escape(printable(text), quote=True))


def _name(attribute: str) -> str:
    return attribute.rstrip("_").replace("_", "-")
