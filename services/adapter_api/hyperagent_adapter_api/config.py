"""The adapter service's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from hyperagent.services import Service
from hyperagent.settings import ServiceSettings, Setting

_FOLDERS = Setting("Folders")
_NETWORK = Setting("Network")
_LIMITS = Setting("Limits")


class AdapterApiSettings(ServiceSettings):
    """The settings of `hyperagent serve adapter-api`."""

    variable_prefix: ClassVar[str] = "HYPERAGENT_ADAPTER_API_"

    bundle: Annotated[Path, _FOLDERS]
    """Folder of the bundle to serve; every file is checked against its digest."""
    store: Annotated[Path, _FOLDERS] = Path("adapters")
    """Folder that gets a folder per adapter; one service at a time."""

    host: Annotated[str, _NETWORK] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, _NETWORK] = Field(Service.ADAPTER_API.default_port, ge=0, le=65_535)
    """Port to listen on; 0 takes a free one."""
    allow_remote: Annotated[bool, _NETWORK] = False
    """Permit an address that other machines can reach; traffic is not encrypted."""
    allowed_hosts: Annotated[tuple[str, ...], replace(_NETWORK, option="--allowed-host")] = ()
    """A name the service answers to besides localhost and IP addresses; may be given several times, and in the variable
    with spaces between."""

    max_adapters: Annotated[int, _LIMITS] = Field(1000, ge=1)
    """Most adapters kept in the store; 507 when it holds that many. All of a bundle's adapters have one size, so this limits
    the store's bytes too."""
    max_pending_requests: Annotated[int, _LIMITS] = Field(8, ge=1)
    """Most prompts waiting or in progress; more are answered with 503."""
