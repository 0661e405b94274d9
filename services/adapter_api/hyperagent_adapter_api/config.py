"""What the adapter service is told when it starts."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from hyperagent.config import StrictModel


class AdapterApiSettings(StrictModel):
    """The adapter service's settings."""

    bundle: Path
    """Folder of the bundle to serve."""
    store: Path = Path("adapters")
    """Folder that gets a folder per adapter; one service at a time."""
    host: str = "127.0.0.1"
    port: int = Field(8703, ge=0, le=65_535)
    """0 takes a free one."""
    allow_remote: bool = False
    """Listen on an address other machines can reach."""
    allowed_hosts: tuple[str, ...] = ()
    """Names the service answers to besides localhost and IP addresses."""
    max_adapters: int = Field(1000, ge=1)
    """Most adapters kept. All of a bundle's adapters have one size, so this limits the store's bytes too."""
    max_pending_requests: int = Field(8, ge=1)
    """Most prompts waiting or in progress; more are turned away."""
