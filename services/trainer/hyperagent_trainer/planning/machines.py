"""Machines that `hyperagent plan` knows: those with GPUs, and the one it runs on, without."""

from __future__ import annotations

import psutil
import torch

from hyperagent import hardware
from hyperagent.errors import ConfigError
from hyperagent.hardware import Machine
from hyperagent_trainer.distributed import machine_bytes

CPU = "1xcpu"
"""The machine that the plan is made on, as one process uses it."""

CORE_FLOPS = 175e9
"""Float32, of one core: measured (docs/plan.md)."""


def machine_named(name: str) -> Machine:
    """The machine of that name: "1xcpu", or one of `hyperagent.hardware`.

    Raises:
        ConfigError: there is none.
    """
    if name != CPU:
        try:
            return hardware.machine_named(name)
        except ConfigError as error:
            raise ConfigError(f"{error}; or {CPU}, the machine at hand") from error
    flops = CORE_FLOPS * num_cores()
    memory = machine_bytes(torch.device("cpu"))
    # One process exchanges nothing.
    return Machine(name, 1, 1, memory, flops, flops, link_bytes_per_s=float("inf"), node_link_bytes_per_s=float("inf"))


def is_cpu(machine: Machine) -> bool:
    """Whether it has no GPU."""
    return machine.name == CPU


def num_cores() -> int:
    """Of this machine, two threads of one core counted once."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
