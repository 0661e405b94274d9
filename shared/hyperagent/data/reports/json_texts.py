"""Walk the texts of a JSON value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def json_texts(value: Any) -> Iterator[str]:
    """Yield every key and every leaf of a JSON value, as text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from json_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from json_texts(item)
    else:
        yield str(value)
