"""What a pre-flight says: named checks, each with what was measured, what was asked for, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hyperagent.errors import ConfigError

Measured = Mapping[str, int | float | str]


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    passed: bool
    measured: Measured
    """Figures by name."""
    bound: str
    """What was asked for."""
    remedy: str
    """Why a failure matters and how to fix it; the same whether it passed or not."""

    @property
    def found(self) -> str:
        """The figures in one line, for people."""
        return ", ".join(f"{name} {_written(value)}" for name, value in self.measured.items())


@dataclass(frozen=True)
class PreflightReport:
    """Every check that was made, in order."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """JSON values of every check, and `passed` of them all."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}

    def require_passed(self) -> None:
        """Stop here unless every check has passed.

        Raises:
            ConfigError: naming every failed check, and of the first what was found, why it matters and how to fix it.
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
