"""Find what an adapter service keeps on disk."""

from __future__ import annotations

from pathlib import Path


def adapter_folder(store_folder: Path, adapter_id: str) -> Path:
    """Return the folder of an adapter, whichever bundle made it."""
    (found,) = store_folder.glob(f"*/{adapter_id}")
    return found


def stored_ids(store_folder: Path) -> set[str]:
    """Return the ids of all adapters, and the names of anything half-written beside them."""
    return {path.name for path in store_folder.glob("*/*")}
