"""Machines that `hyperagent plan` knows."""

from __future__ import annotations

from dataclasses import dataclass

from hyperagent.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """Identical GPUs, in nodes of identical size."""

    name: str
    gpus_per_node: int
    nodes: int
    memory_bytes: int
    """Of one GPU."""
    flops: float
    """Dense bfloat16 operations per second of one GPU."""
    link_bytes_per_s: float
    """That a GPU receives from others of its node in an all-gather; an assumption, below the link's nominal rate."""

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes


# NVIDIA's data sheets: H100 SXM 80 GB, H200 SXM 141 GB, both 989.4 TFLOP/s dense bfloat16 and 450 GB/s NVLink in each
# direction, of which 350 are assumed to arrive.
_H100 = (80 * 10**9, 989.4e12, 350e9)
_H200 = (141 * 10**9, 989.4e12, 350e9)

MACHINES = {
    machine.name: machine
    for machine in (
        Machine("1xh100", 1, 1, *_H100),
        Machine("8xh100", 8, 1, *_H100),
        Machine("1xh200", 1, 1, *_H200),
        Machine("8xh200", 8, 1, *_H200),
        Machine("16xh200", 8, 2, *_H200),
        Machine("64xh200", 8, 8, *_H200),
    )
}


def machine_named(name: str) -> Machine:
    """The machine of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in MACHINES:
        raise ConfigError(f"there is no machine {name!r}; choose from {', '.join(MACHINES)}")
    return MACHINES[name]
