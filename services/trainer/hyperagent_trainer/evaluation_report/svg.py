"""Parts of plots that fit any width: horizontal coordinates are shares of the width, vertical ones are pixels.

So a plot has no view box, and its text has the same size on a telephone and on a wide screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from hyperagent_trainer.evaluation_report.markup import Markup, element

_NUM_STEPS = 5
"""About how many steps an axis has."""


@dataclass(frozen=True)
class Scale:
    """A linear map from values to shares of the width, with round ticks at both ends."""

    ticks: tuple[float, ...]
    """Ascending round values."""
    left: float = 0.0
    """Share of the width at the first tick."""
    right: float = 1.0
    """Share of the width at the last tick."""

    @classmethod
    def over(cls, values: Sequence[float], *, left: float = 0.0, right: float = 1.0) -> Scale:
        """Return a scale that holds zero and all values, of which there is at least one."""
        low, high = min(0.0, *values), max(0.0, *values)
        if low == high:
            high = 1.0
        step = _round_step((high - low) / _NUM_STEPS)
        # A value that is a tick up to rounding must not add another step.
        first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
        return cls(tuple(number * step for number in range(first, last + 1)), left, right)

    def __call__(self, value: float) -> float:
        """Return the share of the width at a value."""
        first, last = self.ticks[0], self.ticks[-1]
        return self.left + (self.right - self.left) * (value - first) / (last - first)


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** floor(log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def percent(share: float) -> str:
    """Write a share of the width as a coordinate."""
    return f"{100 * share:.3f}%"


def line(x1: float, y1: float, x2: float, y2: float, *, class_: str) -> Markup:
    """Return a line; x as shares of the width, y in pixels."""
    return element("line", x1=percent(x1), y1=f"{y1:g}", x2=percent(x2), y2=f"{y2:g}", class_=class_)


def bar(start: float, stop: float, y: float, height: float, *, class_: str, title: str) -> Markup:
    """Return a bar between two shares of the width in any order, with a title that a pointer shows."""
    left, width = min(start, stop), abs(stop - start)
    return element(
        "rect",
        element("title", title),
        x=percent(left),
        y=f"{y:g}",
        width=percent(width),
        height=f"{height:g}",
        class_=class_,
    )


def label(x: float, y: float, content: str, *, class_: str = "", anchor: str = "start") -> Markup:
    """Return text at a share of the width, with its baseline at y pixels."""
    attributes = {"class_": class_} if class_ else {}
    return element("text", content, x=percent(x), y=f"{y:g}", text_anchor=anchor, **attributes)


def figure(name: str, title: str, description: str, parts: Sequence[str], *, height: float, legend: str = "") -> Markup:
    """Return a captioned plot.

    Args:
        name: distinguishes the element ids of this plot from those of others on the page.
        title: caption, and the plot's name for screen readers.
        description: what the plot shows, for screen readers.
        legend: markup between caption and plot.
    """
    drawing = element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *parts,
        role="img",
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-desc",
        width="100%",
        height=f"{height:g}",
        id=name,
    )
    return element("figure", element("figcaption", title), legend or Markup(""), drawing)
