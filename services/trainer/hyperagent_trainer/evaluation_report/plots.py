"""Draw the report's plots of arms as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from hyperagent_trainer.evaluation.arms import FROZEN, OWN, SHUFFLED, STATIC, TEACHER, TRAINED_ON_SHUFFLED
from hyperagent_trainer.evaluation_report.markup import Markup, element, join
from hyperagent_trainer.evaluation_report.numbers import ABSENT, nats, share, share_interval
from hyperagent_trainer.evaluation_report.schema import ArmResult, PositionBin
from hyperagent_trainer.evaluation_report.svg import Scale, bar, figure, label, line, percent
from hyperagent_trainer.evaluation_report.words import ARMS

POSITION_ARMS = (FROZEN, STATIC, OWN, SHUFFLED, TRAINED_ON_SHUFFLED)
"""Arms of the plot by position; more lines than these are hard to distinguish."""

_ROW = 46
"""Height in pixels that an arm has in the plot of the gap."""
_ROOM = 23
"""Most characters of a value and its interval that fit beside the longest name on a telephone."""
_FLOOR = -1.0
"""Where bars are cut: an adapter that does more harm, such as the empty prompt's, would flatten all other bars."""
_LINES = 220
"""Height in pixels of the lines' area in the plot by position."""


def gap_plot(arms: Mapping[str, ArmResult]) -> Markup | None:
    """Plot the share of the gap that each arm closes, with intervals; None if no arm has one.

    The frozen student and the teacher are left out: they are 0% and 100% by definition.
    """
    shown = {
        name: (arms[name], closed)
        for name in ARMS
        if name in arms and name not in (FROZEN, TEACHER) and (closed := arms[name].gap_closed) is not None
    }
    if not shown:
        return None
    bounds = [bound for arm, closed in shown.values() for bound in (closed, arm.gap_low, arm.gap_high)]
    scale = Scale.over([max(bound, _FLOOR) for bound in bounds if bound is not None])
    height = _ROW * len(shown)
    # The lines come first: text has a rim that keeps it readable on top of them.
    parts = [_tick(scale, tick, height) for tick in scale.ticks]
    parts.append(line(scale(0), 0, scale(0), height, class_="zero"))
    for place, (name, (arm, closed)) in enumerate(shown.items()):
        parts.append(_gap_row(name, arm, closed, scale, _ROW * place))
    title = "Share of the gap to the teacher that each arm closes, with 95% intervals"
    if any(closed < _FLOOR for _, closed in shown.values()):
        title = f"{title}; bars are cut at {_FLOOR:.0%}"
    said = "; ".join(f"{ARMS[name][0]} {_gap_text(arm, closed)}" for name, (arm, closed) in shown.items())
    return figure("gap", title, f"Bars from zero. {said}.", parts, height=height + 20)


def _tick(scale: Scale, tick: float, height: float) -> Markup:
    at = scale(tick)
    anchor = "start" if tick == scale.ticks[0] else "end" if tick == scale.ticks[-1] else "middle"
    return join(
        line(at, 0, at, height, class_="grid"),
        label(at, height + 15, f"{round(100 * tick, 6):g}%", anchor=anchor, class_="tick"),
    )


def _gap_row(name: str, arm: ArmResult, closed: float, scale: Scale, top: float) -> Markup:
    words, middle = _gap_text(arm, closed), top + 30
    interval = words.removeprefix(share(closed))
    # A telephone has no room for a long interval beside the name; the table has it.
    written = join(share(closed), element("tspan", interval, class_="long" if len(words) > _ROOM else "short"))
    parts = [
        label(0, top + 15, ARMS[name][0], class_="name"),
        label(1, top + 15, written, anchor="end", class_="value"),
        bar(
            scale(0),
            scale(max(closed, _FLOOR)),
            top + 22,
            16,
            class_=f"bar arm-{name}",
            title=f"{ARMS[name][0]}: {words}",
        ),
    ]
    if arm.gap_low is not None and arm.gap_high is not None:
        low, high = scale(max(arm.gap_low, _FLOOR)), scale(max(arm.gap_high, _FLOOR))
        parts.append(line(low, middle, high, middle, class_="whisker"))
        parts += [line(end, middle - 5, end, middle + 5, class_="whisker") for end in (low, high)]
    return join(*parts)


def _gap_text(arm: ArmResult, closed: float) -> str:
    interval = share_interval(arm.gap_low, arm.gap_high)
    return share(closed) if interval == ABSENT else f"{share(closed)} ({interval})"


def dependent_plot(arms: Mapping[str, ArmResult]) -> Markup | None:
    """Plot the KL on rows that depend on the condition beside that on other rows; None if no arm has both."""
    shown = {
        name: (dependent, other)
        for name in ARMS
        if name in arms
        and name != TEACHER
        and (dependent := arms[name].dependent_kl) is not None
        and (other := arms[name].other_kl) is not None
    }
    if not shown:
        return None
    # The values are written to the right of the bars.
    scale = Scale.over([value for pair in shown.values() for value in pair], right=0.8)
    height = 58
    parts = []
    for place, (name, pair) in enumerate(shown.items()):
        parts.append(label(0, height * place + 15, ARMS[name][0], class_="name"))
        for number, (kind, value) in enumerate(zip(("dependent", "other"), pair, strict=True)):
            top = height * place + 21 + 15 * number
            title = f"{ARMS[name][0]}, {kind} rows: {nats(value)} nats"
            parts.append(bar(scale(0), scale(value), top, 12, class_=f"bar {kind}", title=title))
            parts.append(label(scale(value) + 0.01, top + 10, nats(value), class_="value"))
    said = "; ".join(f"{ARMS[name][0]} {nats(pair[0])} and {nats(pair[1])}" for name, pair in shown.items())
    return figure(
        "dependent",
        "KL on rows that depend on the condition, and on other rows (nats per row, smaller is better)",
        f"Two bars for each arm, dependent rows and other rows: {said}.",
        parts,
        height=height * len(shown),
        legend=_legend([("swatch dependent", "rows that depend on the condition"), ("swatch other", "other rows")]),
    )


def position_plot(bins: Sequence[PositionBin]) -> Markup | None:
    """Plot the KL of the main arms by position; None if there are no bins or none of these arms."""
    names = [name for name in POSITION_ARMS if any(name in one.kl for one in bins)]
    if not names:
        return None
    scale = Scale.over([one.kl[name] for one in bins for name in names if name in one.kl])
    parts = [_level(scale, tick) for tick in scale.ticks]
    for number, one in enumerate(bins):
        parts.append(label(_middle(number, bins), _LINES + 26, _short(one.first), anchor="middle", class_="tick"))
    for name in names:
        for (number, one), (after, next_one) in pairwise(enumerate(bins)):
            # A line across a missing value would invent one.
            if name in one.kl and name in next_one.kl:
                start = (_middle(number, bins), _height(scale, one.kl[name]))
                stop = (_middle(after, bins), _height(scale, next_one.kl[name]))
                parts.append(line(*start, *stop, class_=f"curve arm-{name}"))
        parts += [_dot(number, bins, scale, name) for number, one in enumerate(bins) if name in one.kl]
    said = "; ".join(
        f"{ARMS[name][0]} {', '.join(nats(one.kl[name]) for one in bins if name in one.kl)}" for name in names
    )
    return figure(
        "position",
        "KL by position: where in the student's text the distance to the teacher is (nats per row, smaller is better)",
        f"One line for each arm. {said}. The positions begin at {', '.join(f'{one.first:,}' for one in bins)}.",
        parts,
        height=_LINES + 34,
        legend=_legend([(f"swatch curve arm-{name}", ARMS[name][0]) for name in names]),
    )


def bin_name(one: PositionBin) -> str:
    """Write a range of positions."""
    return f"{one.first:,} to {one.last:,}"


def _level(scale: Scale, tick: float) -> Markup:
    y = _height(scale, tick)
    return join(
        line(0.09, y, 1, y, class_="zero" if tick == 0 else "grid"),
        label(0.075, y + 4, f"{round(tick, 9):g}", anchor="end", class_="tick"),
    )


def _height(scale: Scale, value: float) -> float:
    return round(10 + _LINES * (1 - scale(value)), 2)


def _middle(number: int, bins: Sequence[PositionBin]) -> float:
    return 0.09 + 0.91 * (number + 0.5) / len(bins)


def _short(position: int) -> str:
    return f"{position:,}" if position < 10_000 else f"{position / 1000:.0f}k"


def _dot(number: int, bins: Sequence[PositionBin], scale: Scale, name: str) -> Markup:
    kl = bins[number].kl[name]
    return element(
        "circle",
        element("title", f"{ARMS[name][0]}, {bin_name(bins[number])}: {nats(kl)}"),
        cx=percent(_middle(number, bins)),
        cy=f"{_height(scale, kl):g}",
        r="3.2",
        class_=f"dot arm-{name}",
    )


def _legend(entries: Sequence[tuple[str, str]]) -> Markup:
    keys = []
    for classes, words in entries:
        if "curve" in classes.split():
            mark = element("line", x1="0", y1="6", x2="26", y2="6", class_=classes)
        else:
            mark = element("rect", x="0", y="1", width="26", height="10", class_=f"bar {classes}")
        keys.append(element("li", element("svg", mark, width="26", height="12", aria_hidden="true"), words))
    return element("ul", *keys, class_="legend")
