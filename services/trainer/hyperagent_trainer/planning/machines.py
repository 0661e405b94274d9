"""Look up the machines that `hyperagent plan` knows: those with GPUs, and the CPU that it runs on."""

from __future__ import annotations

import psutil
import torch

from hyperagent import hardware
from hyperagent.errors import ConfigError
from hyperagent.hardware import Machine
from hyperagent_trainer.distributed import machine_bytes

CPU = "1xcpu"
"""Name of the machine that the plan is made on, without a GPU and with one process."""

CORE_FLOPS = 175e9
"""Float32 operations per second of one core, measured (docs/plan.md)."""


def machine_named(name: str) -> Machine:
    """Return the machine of that name: "1xcpu", or one of `hyperagent.hardware`.

    Raises:
        ConfigError: there is no machine of that name.
    """
    if name != CPU:
        try:
            return hardware.machine_named(name)
        except ConfigError as error:
            raise ConfigError(f"{error}; or {CPU}, the machine at hand") from error
    flops = CORE_FLOPS * num_cores()
    memory = machine_bytes(torch.device("cpu"))
    # A single process exchanges no data.
    return Machine(name, 1, 1, memory, flops, flops, link_bytes_per_s=float("inf"), node_link_bytes_per_s=float("inf"))


def is_cpu(machine: Machine) -> bool:
    """Return whether the machine has no GPU."""
    return machine.name == CPU


def num_cores() -> int:
    """Return the number of physical cores of this machine; two threads of one core count once."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
