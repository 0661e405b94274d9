"""Tests of worker processes: results are in order, few rows are in flight, and a killed process is reported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hyperagent.data.pipeline.parallel import map_rows
from hyperagent.errors import ServiceError


@pytest.mark.parametrize("num_workers", [1, 2, None])
def test_results_come_in_the_order_of_the_items(num_workers: int | None) -> None:
    items = [(7 * number) % 101 - 50 for number in range(101)]
    assert list(map_rows(abs, items, num_items=101, num_workers=num_workers)) == [abs(item) for item in items]


def test_items_are_taken_only_as_fast_as_results() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(10_000):
            taken += 1
            yield number

    results = map_rows(abs, items(), num_items=10_000, num_workers=2)
    assert next(results) == 0
    assert taken <= 64
    results.close()


def test_a_process_that_dies_is_reported() -> None:
    with pytest.raises(ServiceError, match=r"a worker process was killed, .* use fewer processes with --workers"):
        list(map_rows(os._exit, [3] * 9, num_items=9, num_workers=2))


def test_an_error_in_a_process_is_raised_here() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(map_rows(int, ["1", "x"], num_items=2, num_workers=2))
