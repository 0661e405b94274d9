"""Describe GPU machines for planning: figures from data sheets and the usable share of a link's rate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hyperagent.errors import ConfigError

LINK_SHARE = 0.78
"""Assumed share of a link's nominal rate that large collectives reach."""
_MAX_PER_NODE = 8


@dataclass(frozen=True)
class Machine:
    """Identical GPUs in nodes of identical size."""

    name: str
    nodes: int
    gpus_per_node: int
    memory_bytes: int
    """Memory of one GPU."""
    flops: float
    """Peak dense bfloat16 operations per second of one GPU."""
    float32_flops: float
    """Peak float32 operations per second of one GPU, without TF32, which is PyTorch's default."""
    link_bytes_per_s: float
    """Bytes per second that a GPU receives from the other GPUs of its node."""
    node_link_bytes_per_s: float
    """Bytes per second that a node receives from other nodes, through one network adapter per GPU."""

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes


@dataclass(frozen=True)
class _Gpu:
    """Nominal figures of one GPU and its network adapter; bytes per second in one direction."""

    memory_bytes: int
    flops: float
    float32_flops: float
    link: float
    adapter: float


# NVIDIA's data sheets of A100 SXM, H100 SXM, H200 SXM and HGX B200, without sparsity; adapters as in DGX A100 (200 Gb/s
# per GPU), DGX H100, H200 and B200 (400 Gb/s per GPU).
_GPUS: Mapping[str, _Gpu] = MappingProxyType(
    {
        "a100": _Gpu(80 * 10**9, 312e12, 19.5e12, 300e9, 25e9),
        "h100": _Gpu(80 * 10**9, 989.4e12, 67e12, 450e9, 50e9),
        "h200": _Gpu(141 * 10**9, 989.4e12, 67e12, 450e9, 50e9),
        "b200": _Gpu(180 * 10**9, 2250e12, 75e12, 900e9, 50e9),
    }
)


def machine_named(name: str) -> Machine:
    """Return the machine with a name such as "8xh200", or "4x8xh200" for four such nodes.

    Raises:
        ConfigError: there is no machine of that name.
    """
    match = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-9]\d?)x([a-z]+\d+)", name)
    if match is None or match[3] not in _GPUS or int(match[2]) > _MAX_PER_NODE:
        raise ConfigError(
            f"no machine is called {name!r}; write GPUSxKIND, such as 8xh200, or NODESxGPUSxKIND, such as 4x8xh200, with up "
            f"to {_MAX_PER_NODE} GPUs in a node and one of {', '.join(_GPUS)} as the kind"
        )
    gpu, per_node = _GPUS[match[3]], int(match[2])
    return Machine(
        name=name,
        nodes=int(match[1] or 1),
        gpus_per_node=per_node,
        memory_bytes=gpu.memory_bytes,
        flops=gpu.flops,
        float32_flops=gpu.float32_flops,
        link_bytes_per_s=LINK_SHARE * gpu.link,
        node_link_bytes_per_s=LINK_SHARE * gpu.adapter * per_node,
    )
