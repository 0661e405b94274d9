"""Test Student's t against the tables and against its density, integrated numerically."""

from __future__ import annotations

from math import gamma, pi, sqrt

import numpy as np
import pytest

from hyperagent_trainer.evaluation.student_t import two_sided_t

# The rows of any printed table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 11: 2.201, 23: 2.069, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize("degrees", TABLE)
def test_the_quantiles_are_those_of_the_tables(degrees: int) -> None:
    assert two_sided_t(0.95, degrees) == pytest.approx(TABLE[degrees], abs=6e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 9, 50])
@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.99])
def test_the_density_between_the_quantiles_integrates_to_the_level(degrees: int, level: float) -> None:
    t, width = two_sided_t(level, degrees), degrees + 1
    x = np.linspace(-t, t, 200_001)
    density = gamma(width / 2) / gamma(degrees / 2) / sqrt(degrees * pi) * (1 + x**2 / degrees) ** (-width / 2)
    assert float(np.trapezoid(density, x)) == pytest.approx(level, abs=1e-6)
