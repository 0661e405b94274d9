"""Small functions of the generated packages, each with two faulty variants.

A task plants the `wrong` fragment; a hasty repair replaces it with the `near_miss`. Both fail the first of the
function's cases, which a repository's check runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Function:
    """One function of a package, as source text."""

    name: str
    other_name: str
    """New name in a rename task."""
    parameters: str
    summary: str
    """Noun phrase that describes the return value."""
    body: str
    """Lines after the docstring, indented by four spaces."""
    right: str
    """Fragment that a fault replaces; it occurs once in the module."""
    wrong: str
    near_miss: str
    symptom: str
    """Description of the fault in `wrong`; it follows the name of the function in a sentence."""
    cases: tuple[tuple[str, str], ...]
    """Arguments and expected results, as source text."""

    @property
    def source(self) -> str:
        """Source text of the definition."""
        return f'def {self.name}({self.parameters}):\n    """Return {self.summary}."""\n{self.body}\n'


SERIES = (
    Function(
        name="running_total",
        other_name="cumulative",
        parameters="values",
        summary="the sum so far at every value",
        body="    totals, total = [], 0\n    for value in values:\n        total += value\n        totals.append(total)\n    return totals",
        right="total += value",
        wrong="total = value",
        near_miss="total -= value",
        symptom="replaces the total instead of adding to it",
        cases=(("[1, 2, 3]", "[1, 3, 6]"), ("[4, 4]", "[4, 8]")),
    ),
    Function(
        name="moving_sum",
        other_name="window_sums",
        parameters="values, width",
        summary="the sum of every `width` neighbours",
        body="    starts = range(len(values) - width + 1)\n    return [sum(values[i : i + width]) for i in starts]",
        right="range(len(values) - width + 1)",
        wrong="range(len(values) - width)",
        near_miss="range(len(values) - width + 2)",
        symptom="stops one window too early",
        cases=(("[1, 2, 3, 4], 2", "[3, 5, 7]"), ("[5, 1, 1], 3", "[7]")),
    ),
    Function(
        name="last",
        other_name="tail",
        parameters="values, count",
        summary="the last `count` values",
        body="    return values[len(values) - count :]",
        right="values[len(values) - count :]",
        wrong="values[len(values) - count + 1 :]",
        near_miss="values[len(values) - count - 1 :]",
        symptom="starts its slice one value too late",
        cases=(("[1, 2, 3], 2", "[2, 3]"), ("[7, 8, 9, 6], 3", "[8, 9, 6]")),
    ),
    Function(
        name="gaps",
        other_name="differences",
        parameters="values",
        summary="the rise from each value to the next",
        body="    return [b - a for a, b in zip(values, values[1:])]",
        right="b - a for",
        wrong="a - b for",
        near_miss="b + a for",
        symptom="subtracts in the wrong order",
        cases=(("[1, 4, 9]", "[3, 5]"), ("[6, 2]", "[-4]")),
    ),
)

SPANS = (
    Function(
        name="sum_range",
        other_name="total_between",
        parameters="first, last",
        summary="the sum of the numbers from `first` to `last`, both included",
        body="    return sum(range(first, last + 1))",
        right="sum(range(first, last + 1))",
        wrong="sum(range(first, last))",
        near_miss="sum(range(first + 1, last + 1))",
        symptom="leaves out the last number",
        cases=(("1, 4", "10"), ("5, 5", "5")),
    ),
    Function(
        name="span_length",
        other_name="days_in_span",
        parameters="first, last",
        summary="the number of days from `first` to `last`, both included",
        body="    return last - first + 1",
        right="last - first + 1",
        wrong="last - first",
        near_miss="last - first + 2",
        symptom="does not count the last day",
        cases=(("3, 7", "5"), ("2, 2", "1")),
    ),
    Function(
        name="overlaps",
        other_name="intersects",
        parameters="a, b",
        summary="whether two (first, last) spans share a day",
        body="    return a[0] <= b[1] and b[0] <= a[1]",
        right="a[0] <= b[1] and b[0] <= a[1]",
        wrong="a[0] <= b[1] or b[0] <= a[1]",
        near_miss="a[0] <= a[1] and b[0] <= b[1]",
        symptom="joins its two conditions with `or`",
        cases=(("(1, 2), (4, 6)", "False"), ("(1, 3), (3, 6)", "True")),
    ),
    Function(
        name="clamp",
        other_name="limit_to",
        parameters="value, low, high",
        summary="the value, moved into the span from `low` to `high`",
        body="    return max(low, min(value, high))",
        right="max(low, min(value, high))",
        wrong="min(low, min(value, high))",
        near_miss="max(low, max(value, high))",
        symptom="takes the smaller of two bounds where it needs the larger",
        cases=(("5, 1, 9", "5"), ("12, 1, 9", "9")),
    ),
)

PAGING = (
    Function(
        name="page_count",
        other_name="count_pages",
        parameters="total, size",
        summary="the number of pages that `total` items need",
        body="    return (total + size - 1) // size",
        right="(total + size - 1) // size",
        wrong="total // size",
        near_miss="(total + 1) // size",
        symptom="drops the last page when it is not full",
        cases=(("11, 5", "3"), ("10, 5", "2")),
    ),
    Function(
        name="first_index",
        other_name="page_start",
        parameters="page, size",
        summary="the index of the first item of a page, pages counted from 1",
        body="    return (page - 1) * size",
        right="(page - 1) * size",
        wrong="size * page",
        near_miss="size * (page + 1)",
        symptom="counts pages from 0",
        cases=(("1, 10", "0"), ("3, 10", "20")),
    ),
    Function(
        name="is_last_page",
        other_name="ends_at",
        parameters="page, size, total",
        summary="whether no item stands after this page",
        body="    return page * size >= total",
        right="page * size >= total",
        wrong="page * size > total",
        near_miss="(page - 1) * size >= total",
        symptom="misses the case in which the last page is full",
        cases=(("2, 5, 10", "True"), ("1, 5, 10", "False")),
    ),
    Function(
        name="items_left",
        other_name="remaining",
        parameters="page, size, total",
        summary="how many items stand after this page",
        body="    return max(total - page * size, 0)",
        right="total - page * size",
        wrong="total + page * size",
        near_miss="total - page",
        symptom="adds the items already shown",
        cases=(("2, 5, 12", "2"), ("3, 5, 12", "0")),
    ),
)

TEXT = (
    Function(
        name="shorten",
        other_name="abbreviate",
        parameters="text, limit",
        summary="the text, cut to `limit` characters with a final `...`",
        body='    if len(text) <= limit:\n        return text\n    return text[: limit - 3] + "..."',
        right="text[: limit - 3]",
        wrong="text[: limit - 2]",
        near_miss="text[: limit - 4]",
        symptom="keeps one character too many",
        cases=(('"abcdefgh", 6', '"abc..."'), ('"abc", 6', '"abc"')),
    ),
    Function(
        name="column",
        other_name="to_width",
        parameters="text, width",
        summary="the text, cut or padded to `width` characters",
        body="    return text.ljust(width)[:width]",
        right="text.ljust(width)[:width]",
        wrong="text.ljust(width)[: width - 1]",
        near_miss="text.ljust(width - 1)[:width]",
        symptom="cuts one character too early",
        cases=(('"ab", 4', '"ab  "'), ('"abcdef", 4', '"abcd"')),
    ),
    Function(
        name="is_palindrome",
        other_name="reads_both_ways",
        parameters="text",
        summary="whether the text reads the same backwards",
        body="    return text == text[::-1]",
        right="text == text[::-1]",
        wrong="text != text[::-1]",
        near_miss="text >= text[::-1]",
        symptom="tests for difference instead of equality",
        cases=(('"dab"', "False"), ('"level"', "True")),
    ),
    Function(
        name="longest",
        other_name="longest_word",
        parameters="words",
        summary="the longest of the words",
        body="    return max(words, key=len)",
        right="max(words, key=len)",
        wrong="min(words, key=len)",
        near_miss="max(words)",
        symptom="picks the shortest word",
        cases=(('["a", "abc", "bb"]', '"abc"'), ('["zz", "long"]', '"long"')),
    ),
)

SCORES = (
    Function(
        name="average",
        other_name="mean",
        parameters="values",
        summary="the mean of the values",
        body="    return sum(values) / len(values)",
        right="sum(values) / len(values)",
        wrong="sum(values) / (len(values) - 1)",
        near_miss="sum(values) / (len(values) + 1)",
        symptom="divides by one less than the number of values",
        cases=(("[2, 4, 6]", "4.0"), ("[1, 1, 4, 2]", "2.0")),
    ),
    Function(
        name="rank",
        other_name="place",
        parameters="values, value",
        summary="the place of a value among all, the highest being 1",
        body="    return sorted(values, reverse=True).index(value) + 1",
        right=".index(value) + 1",
        wrong=".index(value)",
        near_miss=".index(value) - 1",
        symptom="counts places from 0",
        cases=(("[5, 9, 7], 9", "1"), ("[5, 9, 7], 5", "3")),
    ),
    Function(
        name="count_above",
        other_name="how_many_above",
        parameters="values, limit",
        summary="how many values are greater than `limit`",
        body="    return sum(1 for value in values if value > limit)",
        right="if value > limit",
        wrong="if value < limit",
        near_miss="if value >= limit",
        symptom="counts the values below the limit",
        cases=(("[1, 5, 9, 8], 5", "2"), ("[3, 4], 1", "2")),
    ),
    Function(
        name="spread",
        other_name="value_range",
        parameters="values",
        summary="the difference of the largest and the smallest value",
        body="    return max(values) - min(values)",
        right="max(values) - min(values)",
        wrong="max(values) + min(values)",
        near_miss="min(values) - max(values)",
        symptom="adds where it should subtract",
        cases=(("[4, 9, 6]", "5"), ("[3, 3]", "0")),
    ),
)

ALGORITHMS: Mapping[str, tuple[Function, ...]] = MappingProxyType(
    {"series": SERIES, "spans": SPANS, "paging": PAGING, "text": TEXT, "scores": SCORES}
)
"""Functions of each module that a package can have, by module name."""
