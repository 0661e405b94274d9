"""Tests of the cache with every system call failing once."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_whichever_call_fails_nothing_is_lost_and_the_next_try_succeeds(
    step: int, inject_faults: Callable[..., dict[str, int]]
) -> None:
    calls = inject_faults("errors", "--step", str(step))
    assert set(calls) == {
        "ENOSPC", "ENOSPC once", "EIO", "EIO from then on", "EIO on reading", "EMFILE", "EMFILE once",
    }  # fmt: skip
    assert min(calls.values()) > 20
