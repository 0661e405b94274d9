"""Write numbers for people."""

from __future__ import annotations

ABSENT = "–"  # noqa: RUF001  The dash of tables, for a number that does not exist.


def nats(value: float | None) -> str:
    """Write a KL divergence with four decimals."""
    # Adding 0.0 turns a negative zero, which rounding can leave, into zero.
    return ABSENT if value is None else f"{round(value, 4) + 0.0:.4f}"


def share(value: float | None) -> str:
    """Write a fraction as a percentage with one decimal."""
    return ABSENT if value is None else f"{round(100 * value, 1) + 0.0:,.1f}%"


def share_interval(low: float | None, high: float | None) -> str:
    """Write the bounds of a fraction's interval."""
    return ABSENT if low is None or high is None else f"{share(low)} to {share(high)}"


def nats_interval(low: float | None, high: float | None) -> str:
    """Write the bounds of an interval in nats."""
    return ABSENT if low is None or high is None else f"{nats(low)} to {nats(high)}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number with its noun in the right form."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def size(num_bytes: int) -> str:
    """Write a number of bytes with a binary unit."""
    amount, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:,.0f} bytes" if unit == "bytes" else f"{amount:,.1f} {unit}"


def duration(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
