"""Find the columns of trajectories under the names that published data sets give them, and fill in what is missing.

Known names are found by themselves. For others, a small file beside the data says which column is which: `NAME.columns.yaml`
for the file NAME, or `columns.yaml` in a folder of shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from hyperagent.config import StrictModel, load_yaml
from hyperagent.errors import DataError

Row = Mapping[str, Any]

NO_REPOSITORY = "no-repository/"
"""Start of the repository of a row that names none; each such row counts as a repository of its own."""

_KNOWN: dict[str, tuple[str, ...]] = {
    "trajectory_id": ("trajectory_id", "traj_id", "id"),
    "instance_id": ("instance_id",),
    "repo": ("repo",),
    "trajectory": ("trajectory", "messages", "conversations"),
    "tools": ("tools",),
    "exit_status": ("exit_status",),
    "resolved": ("resolved",),
}
# SWE-bench's ids are owner__name-number, SWE-smith's owner__name.commit.change.
_INSTANCE = re.compile(r"(?P<owner>.+?)__(?P<name>.+?)(?:-\d+|\.[0-9a-f]{6,40}\..+)")


class Columns(StrictModel):
    """Names of a data set's columns; None means a known name, if the data set has one."""

    trajectory_id: str | None = None
    instance_id: str | None = None
    repo: str | None = None
    """Column whose text is the repository. Without one it is read off an instance id such as `owner__name-12`."""
    trajectory: str | None = None
    """Column with the messages, a list or its JSON text."""
    tools: str | None = None
    exit_status: str | None = None
    resolved: str | None = None

    def sources(self, names: Iterable[str], path: Path) -> dict[str, str]:
        """Return the column of the data set for each of our own that it has.

        Raises:
            DataError: a column that the mapping names is missing, or there is none with messages.
        """
        names = list(names)
        found = {}
        for own, known in _KNOWN.items():
            chosen = getattr(self, own)
            if chosen is not None and chosen not in names:
                raise DataError(f"{path} has no column {chosen!r} for {own}; it has {', '.join(names)}")
            candidates = [chosen] if chosen else [name for name in known if name in names]
            if candidates:
                found[own] = candidates[0]
        if "trajectory" not in found:
            raise DataError(
                f"{path} has no column with messages: it has {', '.join(names) or 'none'}, but none of "
                f"{', '.join(_KNOWN['trajectory'])}; name it in {columns_file(path).name}, as in `trajectory: my_column`"
            )
        return found


def columns_file(path: Path) -> Path:
    """Return where the names of the columns of a data file, or of a folder of shards, are looked for."""
    return path / "columns.yaml" if path.is_dir() else path.with_name(f"{path.name}.columns.yaml")


def read_columns(path: Path) -> Columns:
    """Read the names of a data set's columns; the known ones if no file says otherwise.

    Raises:
        ConfigError: the file that names them cannot be read.
    """
    place = columns_file(path)
    return load_yaml(place, Columns) if place.is_file() else Columns()


def row_of(raw: Mapping[str, Any], sources: Mapping[str, str]) -> Row:
    """Return a row with all of our columns, None for what is missing and cannot be made.

    A missing trajectory id is made from the content, and a missing repository from the instance id; JSON text of messages
    and tools is parsed where it is JSON.

    Args:
        sources: `Columns.sources`.
    """
    row = {own: raw.get(sources[own]) if own in sources else None for own in _KNOWN}
    for name in ("trajectory", "tools"):
        row[name] = _parsed(row[name])
    for name in ("trajectory_id", "instance_id"):
        if isinstance(row[name], int) and not isinstance(row[name], bool):
            row[name] = str(row[name])
    if row["trajectory_id"] in (None, ""):
        content = [row[name] for name in ("instance_id", "trajectory", "tools")]
        digest = blake3(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        row["trajectory_id"] = f"made-{digest[:32]}"
    if row["repo"] in (None, ""):
        found = _INSTANCE.fullmatch(row["instance_id"]) if isinstance(row["instance_id"], str) else None
        row["repo"] = f"{found['owner']}/{found['name']}" if found else f"{NO_REPOSITORY}{row['trajectory_id']}"
    return row


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # Its row is refused by the type.
