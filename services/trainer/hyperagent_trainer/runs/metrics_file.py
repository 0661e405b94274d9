"""Reading a run's metrics bit by bit, although a run that is resumed cuts the lines of the steps that it does again.

The number of a line does not say which line it is, then. A place in the metrics is the number of lines before it
together with a digest of them. A reader whose place is no longer there gets all lines from the start, marked by
`is_reset`, whoever changed the file and when.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hyperagent.errors import CorruptRecord
from hyperagent.storage.files import write_atomically

PLACE_PATTERN = r"^[0-9]{1,10}(-[0-9a-f]{16})?$"
"""A place as text: the number of lines, and the digest unless only the number is known."""

_DIGEST_BYTES = 8


@dataclass(frozen=True)
class Place:
    """Where to go on reading."""

    num_lines: int = 0
    digest: str | None = None
    """Of all bytes of those lines, hex; None for a caller that trusts the number."""

    @classmethod
    def parse(cls, text: str) -> Place:
        """The place that `str` made the text of; `text` must match `PLACE_PATTERN`."""
        num_lines, _, digest = text.partition("-")
        return cls(int(num_lines), digest or None)

    def __str__(self) -> str:
        return str(self.num_lines) if self.digest is None else f"{self.num_lines}-{self.digest}"


START = Place()


@dataclass(frozen=True)
class MetricLines:
    """What was found at a place."""

    values: Sequence[dict[str, Any]]
    places: Sequence[Place]
    """Where to go on after each of `values`."""
    next: Place
    """Where to go on after all of them."""
    is_reset: bool
    """Whether the lines before the place are no longer there, so that `values` begins with the first line of all."""


def read_lines(path: Path, since: Place, *, limit: int) -> MetricLines:
    """At most `limit` lines from `since` on; a missing file has none.

    A last line that is still being written is left for the next call. A number that is not finite is None, as JSON has
    no word for it.

    Raises:
        CorruptRecord: a line is not JSON.
    """
    values: list[dict[str, Any]] = []
    places = []
    # Opened once: a file that takes this one's place meanwhile is for the next call.
    with path.open("rb") if path.exists() else io.BytesIO() as file:
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        num_before = 0
        for line in islice(file, since.num_lines):
            digest.update(line)
            num_before += line.endswith(b"\n")
        is_reset = num_before < since.num_lines or since.digest not in (None, digest.hexdigest())
        if is_reset:
            file.seek(0)
            digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
            num_before = 0
        after = Place(num_before, digest.hexdigest())
        for line in islice(file, limit):
            if not line.endswith(b"\n"):
                break
            values.append(_parse(line, path, after.num_lines + 1))
            digest.update(line)
            after = Place(after.num_lines + 1, digest.hexdigest())
            places.append(after)
    return MetricLines(values, places, after, is_reset)


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(line, parse_float=_finite, parse_constant=_finite)
    except ValueError as error:
        raise CorruptRecord(f"{path}: line {number} is not JSON; delete it to read on") from error
    return value


def _finite(text: str) -> float | None:
    """Of a number, or one of the words NaN, Infinity and -Infinity that other writers of JSON may leave."""
    number = float(text)
    return number if math.isfinite(number) else None


def truncate_after(metrics: Path, last_step: int) -> None:
    """Remove the lines of steps after `last_step`, and a line that a killed process left unfinished; step 0 removes all.

    Raises:
        StorageError: the file system refused.
    """
    if not metrics.exists():
        return
    kept = [line for line in _whole_lines(metrics) if last_step > 0 and json.loads(line)["step"] <= last_step]
    write_atomically(metrics, "".join(kept).encode())


@dataclass(frozen=True)
class HeldOutKL:
    """The held-out KL of one evaluation."""

    step: int
    """Optimizer steps done before it."""
    kl: dict[str, float]
    """Nats per supervised token, by arm."""


def last_held_out_kl(metrics: Path, step: int) -> HeldOutKL:
    """Return the last evaluation at `step` or before it; the run may be writing meanwhile.

    Raises:
        CorruptRecord: the metrics cannot be read, or tell of none.
    """
    try:
        lines = [json.loads(line) for line in _whole_lines(metrics)]
    except (OSError, ValueError) as error:
        raise CorruptRecord(f"{metrics} cannot be read: {error}; restore it") from error
    for line in reversed(lines):
        if line["step"] <= step and "held_out_kl" in line:
            found = {arm: math.nan if kl is None else kl for arm, kl in line["held_out_kl"].items()}
            return HeldOutKL(line["step"], found)
    raise CorruptRecord(f"{metrics} tells of no evaluation at step {step} or before it; restore it")


def _whole_lines(metrics: Path) -> list[str]:
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]
