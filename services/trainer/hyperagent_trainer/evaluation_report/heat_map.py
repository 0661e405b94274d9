"""Draw the cosines between the adapters of held-out repositories as a heat map."""

from __future__ import annotations

from hyperagent_trainer.evaluation_report.markup import Markup, element
from hyperagent_trainer.evaluation_report.schema import Similarity
from hyperagent_trainer.evaluation_report.svg import figure, label, percent

_LEFT, _TOP = 0.06, 18.0
"""Share of the width, and pixels, that the numbers of rows and columns take."""
_MOST_WITH_NUMBERS = 8
"""Most columns whose cells have room for their number on a telephone."""


def heat_map(similarity: Similarity) -> Markup:
    """Draw the matrix; a cell's opacity is the size of the cosine, and its color the sign."""
    num = len(similarity.repositories)
    width, height = (1 - _LEFT) / num, 28.0 if num <= 12 else 18.0
    parts: list[str] = []
    for row, cosines in enumerate(similarity.cosine):
        y = _TOP + height * row
        parts.append(label(_LEFT - 0.012, y + height / 2 + 4, str(row + 1), anchor="end", class_="tick"))
        parts.append(label(_LEFT + width * (row + 0.5), _TOP - 6, str(row + 1), anchor="middle", class_="tick"))
        for column, cosine in enumerate(cosines):
            x = _LEFT + width * column
            names = f"{similarity.repositories[row]}, {similarity.repositories[column]}: {cosine:.3f}"
            parts.append(_cell(x, y, width, height, cosine, names))
            if num <= _MOST_WITH_NUMBERS:
                class_ = "in-cell in-full-cell" if abs(cosine) > 0.6 else "in-cell"
                parts.append(label(x + width / 2, y + height / 2 + 4, f"{cosine:.2f}", anchor="middle", class_=class_))
    return figure(
        "similarity",
        "Cosine between the adapters of two repositories (blue: positive, orange: negative; stronger color: larger)",
        f"A matrix of {num} by {num} cells. The mean of the cells off the diagonal is {similarity.mean_cosine:.3f}.",
        parts,
        height=_TOP + height * num,
    )


def _cell(x: float, y: float, width: float, height: float, cosine: float, title: str) -> Markup:
    return element(
        "rect",
        element("title", title),
        x=percent(x),
        y=f"{y:g}",
        width=percent(width),
        height=f"{height:g}",
        fill_opacity=f"{min(1.0, abs(cosine)):.3f}",
        class_="cell" if cosine >= 0 else "cell negative",
    )
