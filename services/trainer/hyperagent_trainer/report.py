"""The report of a pre-flight: named checks, each with what was measured, what is required, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hyperagent.errors import ConfigError

Measured = Mapping[str, int | float | str]


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    passed: bool
    measured: Measured
    """Measured values by name."""
    bound: str
    """What the check requires."""
    remedy: str
    """Why a failure matters and how to fix it; the same whether the check passed or not."""
    warns: bool = False
    """Whether the measured values are outside the bound of a check that does not prevent training."""

    @property
    def found(self) -> str:
        """The measured values in one human-readable line."""
        return ", ".join(f"{name} {_written(value)}" for name, value in self.measured.items())


@dataclass(frozen=True)
class PreflightReport:
    """The results of all checks, in order."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: every check, and whether all of them passed."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}

    def require_passed(self) -> None:
        """Raise unless every check passed.

        Raises:
            ConfigError: a check failed. The message names every failed check and says for the first what was found, what
                is required, why it matters and how to fix it.
        """
        failed = [check for check in self.checks if not check.passed]
        if not failed:
            return
        first, others = failed[0], [check.name for check in failed[1:]]
        also = f" (also failed: {', '.join(others)})" if others else ""
        raise ConfigError(
            f"pre-flight check {first.name} failed{also}: found {first.found}; wanted {first.bound}; {first.remedy}"
        )


def _written(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
