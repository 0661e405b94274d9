"""Settings of the adapter service."""

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
    """Settings of `hyperagent serve adapter-api`."""

    variable_prefix: ClassVar[str] = "HYPERAGENT_ADAPTER_API_"

    bundle: Annotated[Path, _FOLDERS]
    """Folder of the bundle to serve; every file is checked against its digest."""
    store: Annotated[Path, _FOLDERS] = Path("adapters")
    """Folder for the adapters, each in its own subfolder; used by one service at a time."""

    host: Annotated[str, _NETWORK] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, _NETWORK] = Field(Service.ADAPTER_API.default_port, ge=0, le=65_535)
    """Port to listen on; 0 chooses a free one."""
    allow_remote: Annotated[bool, _NETWORK] = False
    """Permit an address that is reachable from other machines; traffic is not encrypted."""
    allowed_hosts: Annotated[tuple[str, ...], replace(_NETWORK, option="--allowed-host")] = ()
    """Host name accepted in addition to localhost and IP addresses; repeatable, and separated by spaces in the
    variable."""

    max_adapters: Annotated[int, _LIMITS] = Field(1000, ge=1)
    """Maximum number of adapters in the store; further ones are refused with 507. All adapters of a bundle have the
    same size, so this also limits the store's bytes."""
    max_pending_requests: Annotated[int, _LIMITS] = Field(8, ge=1)
    """Maximum number of prompts waiting or in progress; further ones are refused with 503."""
