"""The control process's settings."""

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
    """The settings of `hyperagent serve trainer`."""

    variable_prefix: ClassVar[str] = "HYPERAGENT_TRAINER_"

    recipes: Annotated[Path, _FOLDERS] = Path("recipes")
    """Folder of the recipes that may be run, `NAME.yaml` each; a caller chooses one by name."""
    runs: Annotated[Path, _FOLDERS] = Path("runs")
    """Folder that gets a folder per run; one control process at a time."""

    host: Annotated[str, _NETWORK] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, _NETWORK] = Field(Service.TRAINER.default_port, ge=1, le=65_535)
    """Port to listen on."""
    allow_remote: Annotated[bool, _NETWORK] = False
    """Permit an address that other machines can reach; traffic is not encrypted."""
    allowed_hosts: Annotated[tuple[str, ...], replace(_NETWORK, option="--allowed-host")] = ()
    """A name the service answers to besides localhost and IP addresses; may be given several times, and in the variable
    with spaces between."""

    stop_grace_s: Annotated[float, _PROCESS] = Field(60.0, gt=0, le=3600)
    """Seconds a training process has to save and end before it is killed."""
