"""Settings of the plugin, from environment variables, since vLLM's command line knows nothing of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from hyperagent.config import StrictModel, parse

_PREFIX = "HYPERAGENT_VLLM_"


class PluginSettings(StrictModel):
    """Settings of the plugin."""

    service: str
    """URL of the adapter service."""
    on_failure: Literal["refuse", "base"] = "refuse"
    """What a request gets whose adapter cannot be made or loaded: the error, or an answer without an adapter."""
    staging: Path | None = None
    """Folder for the adapters that the engine knows; by default a new one under the system's temporary folder."""
    max_adapters: int = Field(64, ge=1)
    """Adapters that the engine knows at once."""
    max_loads: int = Field(4, ge=1)
    """Adapters that are fetched and loaded at the same time."""
    timeout_s: float = Field(60.0, gt=0)
    """Time that the adapter service has for one answer."""


def read_settings(environment: Mapping[str, str] = os.environ) -> PluginSettings | None:
    """Return the settings, or None if no adapter service is named, so that the plugin does nothing.

    Raises:
        ConfigError: a variable is unknown or has an invalid value.
    """
    found = {name[len(_PREFIX) :].lower(): value for name, value in environment.items() if name.startswith(_PREFIX)}
    if not found.get("service"):
        return None
    return parse(found, PluginSettings, source="the environment (HYPERAGENT_VLLM_*)")
