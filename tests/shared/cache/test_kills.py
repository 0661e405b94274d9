"""The cache under SIGKILL: at every call, and at any moment.

Apart from the other tests of the cache, because no coverage is measured here: what a killed process covered is lost with it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_whichever_call_is_the_last_what_was_acknowledged_is_there(
    step: int, inject_faults: Callable[..., dict[str, int]]
) -> None:
    calls = inject_faults("kills", "--step", str(step))
    assert calls["before"] == calls["after"] > 100


@pytest.mark.parametrize(("kills", "least"), [(25, 1), pytest.param(500, 101, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_kills_at_random_moments(kills: int, least: int, inject_faults: Callable[..., dict[str, int]]) -> None:
    result = inject_faults("random", "--kills", str(kills))
    assert result["kills"] == kills
    assert result["acknowledged"] >= least
