"""Settings of the control process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from hyperagent.services import Service
from hyperagent.settings import ServiceSettings, Setting

_FOLDERS = Setting("Folders")
_NETWORK = Setting("Network")
_PROCESS = Setting("Process")


class ControlSettings(ServiceSettings):
    """Settings of `hyperagent serve trainer`."""

    variable_prefix: ClassVar[str] = "HYPERAGENT_TRAINER_"

    recipes: Annotated[Path, _FOLDERS] = Path("recipes")
    """Folder of the available recipes, each a file `NAME.yaml`; callers choose one by name."""
    runs: Annotated[Path, _FOLDERS] = Path("runs")
    """Folder for the runs, each in its own subfolder; used by one control process at a time."""

    host: Annotated[str, _NETWORK] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, _NETWORK] = Field(Service.TRAINER.default_port, ge=1, le=65_535)
    """Port to listen on."""
    allow_remote: Annotated[bool, _NETWORK] = False
    """Permit an address that is reachable from other machines; traffic is not encrypted."""
    allowed_hosts: Annotated[tuple[str, ...], replace(_NETWORK, option="--allowed-host")] = ()
    """Host name accepted in addition to localhost and IP addresses; repeatable, and separated by spaces in the
    variable."""

    stop_grace_s: Annotated[float, _PROCESS] = Field(60.0, gt=0, le=3600)
    """Seconds that a training process has to save and exit before it is killed."""
