"""Test that plots are true to scale, by reading the scale off the tick labels as a reader would."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hyperagent_trainer.evaluation_report.svg import Scale

from .evaluations import ARMS, evaluation
from .pages import Element, Page, coordinate, page_of

PLOTTED = ("static", "own", "shuffled", "same_repository", "empty", "mean", "trained_on_shuffled", "oracle")
# Coordinates are written with three decimals of a percent.
ROUNDING = 0.002


def _scale_of(ticks: dict[float, float]) -> tuple[float, float]:
    """Return slope and offset of the line through all ticks, given as position by value."""
    values, places = np.array(sorted(ticks.items())).T
    slope, offset = np.polyfit(values, places, 1)
    assert len(ticks) >= 3
    np.testing.assert_allclose(slope * values + offset, places, atol=ROUNDING)
    return float(slope), float(offset)


def _gap_scale(page: Page) -> tuple[float, float]:
    labels = page.all("text", inside="gap", class_="tick")
    return _scale_of({float(one.text.removesuffix("%")) / 100: coordinate(one, "x") for one in labels})


def test_bars_of_the_gap_reach_from_zero_to_their_value(tmp_path: Path) -> None:
    page = page_of(evaluation(), tmp_path)
    slope, zero = _gap_scale(page)
    bars = page.all("rect", inside="gap", class_="bar")
    assert [one.attributes["class"] for one in bars] == [f"bar arm-{name}" for name in PLOTTED]
    for name, bar in zip(PLOTTED, bars, strict=True):
        closed = ARMS[name]["gap_closed"]
        left, width = coordinate(bar, "x"), coordinate(bar, "width")
        ends = (zero + slope * min(closed, 0), zero + slope * max(closed, 0))
        assert (left, left + width) == pytest.approx(ends, abs=2 * ROUNDING)


def test_whiskers_of_the_gap_are_the_interval(tmp_path: Path) -> None:
    page = page_of(evaluation(), tmp_path)
    slope, zero = _gap_scale(page)
    whiskers = [
        one for one in page.all("line", inside="gap", class_="whisker") if one.attributes["y1"] == one.attributes["y2"]
    ]
    for name, whisker in zip(PLOTTED, whiskers, strict=True):
        ends = (zero + slope * ARMS[name]["gap_low"], zero + slope * ARMS[name]["gap_high"])
        assert (coordinate(whisker, "x1"), coordinate(whisker, "x2")) == pytest.approx(ends, abs=2 * ROUNDING)


def test_the_zero_line_is_at_zero_and_everything_is_inside(tmp_path: Path) -> None:
    page = page_of(evaluation(), tmp_path)
    _, zero = _gap_scale(page)
    (line,) = page.all("line", inside="gap", class_="zero")
    assert coordinate(line, "x1") == coordinate(line, "x2") == pytest.approx(zero, abs=ROUNDING)
    for plot in ("gap", "dependent", "position", "similarity"):
        (drawing,) = [one for one in page.all("svg") if one.attributes.get("id") == plot]
        height = coordinate(drawing, "height")
        parts = [one for one in page.elements if plot in one.inside and one.tag in ("rect", "line", "circle", "text")]
        assert parts
        for part in parts:
            for name, value in part.attributes.items():
                if name in ("x", "x1", "x2", "cx"):
                    assert value.endswith("%")
                    assert 0 <= coordinate(part, name) <= 100
                elif name in ("y", "y1", "y2", "cy"):
                    assert 0 <= coordinate(part, name) <= height
        for rect in page.all("rect", inside=plot):
            assert coordinate(rect, "x") + coordinate(rect, "width") <= 100 + ROUNDING
            assert coordinate(rect, "y") + coordinate(rect, "height") <= height


def test_an_arm_without_interval_has_a_bar_and_no_whisker(tmp_path: Path) -> None:
    value = evaluation()
    for arm in value["arms"].values():
        arm.update(gap_low=None, gap_high=None)
    page = page_of(value, tmp_path)
    assert len(page.all("rect", inside="gap", class_="bar")) == len(PLOTTED)
    assert page.all("line", inside="gap", class_="whisker") == []


def test_bars_of_dependent_and_other_rows_are_proportional_to_their_kl(tmp_path: Path) -> None:
    page = page_of(evaluation(), tmp_path)
    names = ("frozen", *PLOTTED)
    shown = [name for name in ARMS if name in names]
    for kind in ("dependent", "other"):
        bars = page.all("rect", inside="dependent", class_=kind)
        widths = sorted(coordinate(bar, "width") for bar in bars)
        values = sorted(ARMS[name][f"{kind}_kl"] for name in shown)
        largest = max(page.all("rect", inside="dependent", class_="bar"), key=lambda one: coordinate(one, "width"))
        unit = coordinate(largest, "width") / max(ARMS[name]["dependent_kl"] for name in shown)
        np.testing.assert_allclose(widths, np.array(values) * unit, atol=2 * ROUNDING)
        assert {coordinate(bar, "x") for bar in bars} == {0.0}


def test_points_by_position_are_at_their_kl(tmp_path: Path) -> None:
    page = page_of(evaluation(), tmp_path)
    # Values have labels to the left of the plot, positions have labels in the middle of their range.
    ticks = page.all("text", inside="position", class_="tick")
    levels = [one for one in ticks if one.attributes["text-anchor"] == "end"]
    # A label's baseline is 4 pixels below its line.
    slope, offset = _scale_of({float(one.text): coordinate(one, "y") - 4 for one in levels})
    columns = [coordinate(one, "x") for one in ticks if one.attributes["text-anchor"] == "middle"]
    assert slope < 0
    for name in ("frozen", "static", "own", "shuffled", "trained_on_shuffled"):
        dots = page.all("circle", inside="position", class_=f"arm-{name}")
        wanted = [offset + slope * one["kl"][name] for one in evaluation()["by_position"]]
        np.testing.assert_allclose([coordinate(dot, "cy") for dot in dots], wanted, atol=0.02)
        np.testing.assert_allclose([coordinate(dot, "cx") for dot in dots], columns, atol=ROUNDING)
        lines = page.all("line", inside="position", class_=f"arm-{name}")
        assert [_ends(line) for line in lines] == [(*_place(start), *_place(stop)) for start, stop in pairwise(dots)]
    assert page.all("circle", inside="position", class_="arm-mean") == []


def _place(dot: Element) -> tuple[float, float]:
    return coordinate(dot, "cx"), coordinate(dot, "cy")


def _ends(line: Element) -> tuple[float, float, float, float]:
    return coordinate(line, "x1"), coordinate(line, "y1"), coordinate(line, "x2"), coordinate(line, "y2")


def test_a_missing_value_leaves_a_hole_and_is_not_drawn_as_zero(tmp_path: Path) -> None:
    value = evaluation()
    del value["by_position"][3]["kl"]["static"]
    value["arms"]["static"].update(dependent_kl=None)
    page = page_of(value, tmp_path)
    assert len(page.all("circle", inside="position", class_="arm-static")) == 7
    assert len(page.all("line", inside="position", class_="arm-static")) == 5
    names = [one.text for one in page.all("text", inside="dependent", class_="name")]
    assert len(names) == len(PLOTTED)
    assert "one static LoRA" not in names


def test_cells_show_the_cosine_by_opacity_and_its_sign_by_color(tmp_path: Path) -> None:
    page = page_of(evaluation(), tmp_path)
    cells = page.all("rect", inside="similarity", class_="cell")
    cosines = np.array(evaluation()["similarity"]["cosine"])
    opacity = np.array([float(cell.attributes["fill-opacity"]) for cell in cells]).reshape(4, 4)
    negative = np.array(["negative" in cell.attributes["class"].split() for cell in cells]).reshape(4, 4)
    np.testing.assert_allclose(opacity, abs(cosines), atol=1e-3)
    np.testing.assert_array_equal(negative, cosines < 0)
    # Row by row from the top, and in a row from the left.
    places = [(coordinate(cell, "y"), coordinate(cell, "x")) for cell in cells]
    assert places == sorted(places)
    assert len({coordinate(cell, "width") for cell in cells}) == 1


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.62, 0.1], [0, 0.2, 0.4, 0.6, 0.8]),
        ([-0.13, 0.8], [-0.2, 0, 0.2, 0.4, 0.6, 0.8]),
        ([-3.0, -1.0], [-3, -2, -1, 0]),
        ([0.0], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([5e-7], [0, 1e-7, 2e-7, 3e-7, 4e-7, 5e-7]),
        ([1700.0], [0, 500, 1000, 1500, 2000]),
    ],
)
def test_a_scale_holds_zero_and_all_values_between_round_ticks(values: list[float], ticks: list[float]) -> None:
    scale = Scale.over(values, left=0.1, right=0.9)
    np.testing.assert_allclose(scale.ticks, ticks, rtol=1e-12, atol=1e-20)
    assert scale(ticks[0]) == pytest.approx(0.1)
    assert scale(ticks[-1]) == pytest.approx(0.9)
    assert scale((ticks[0] + ticks[-1]) / 2) == pytest.approx(0.5)
