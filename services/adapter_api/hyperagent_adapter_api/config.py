"""Settings of the adapter service."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hyperagent.services import Service
from hyperagent.settings import ServiceSettings, Setting

_FOLDERS = Setting("Folders")
_NETWORK = Setting("Network")
_ADAPTERS = Setting("Adapters")
_LIMITS = Setting("Limits")


class AdapterApiSettings(ServiceSettings):
    """Settings of `hyperagent serve adapter-api`."""

    variable_prefix: ClassVar[str] = "HYPERAGENT_ADAPTER_API_"

    bundle: Annotated[Path, _FOLDERS]
    """Folder of the bundle to serve; every file is checked against its digest."""
    store: Annotated[Path, _FOLDERS] = Path("adapters")
    """Folder for the adapters, each in its own subfolder; several services can share it."""

    host: Annotated[str, _NETWORK] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, _NETWORK] = Field(Service.ADAPTER_API.default_port, ge=0, le=65_535)
    """Port to listen on; 0 chooses a free one."""
    allow_remote: Annotated[bool, _NETWORK] = False
    """Permit an address that is reachable from other machines; traffic is not encrypted."""
    allowed_hosts: Annotated[tuple[str, ...], replace(_NETWORK, option="--allowed-host")] = ()
    """Host name accepted in addition to localhost and IP addresses; repeatable, and separated by spaces in the
    variable."""

    dtype: Annotated[Literal["bfloat16", "float32"], _ADAPTERS] = "bfloat16"
    """Data type of the adapters' factors; vLLM loads bfloat16 much faster."""

    max_store_mib: Annotated[int, _LIMITS] = Field(4096, ge=1)
    """Total size of a bundle's adapters in MiB; the least recently used ones without a lease are evicted to stay below it."""
    adapter_ttl_s: Annotated[float | None, _LIMITS] = Field(None, gt=0)
    """Seconds after which an adapter that nobody used is evicted; by default never."""
    max_pending_requests: Annotated[int, _LIMITS] = Field(8, ge=1)
    """Maximum number of adapters waiting to be generated; further ones are refused with 429."""
