"""The processes that train together: one on a laptop, one per GPU under torchrun, on one machine or on many.

torchrun tells each process its place by environment variables (https://docs.pytorch.org/docs/stable/elastic/run.html).
Without them there is one process and no process group, and everything below does nothing.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

# Longer than any one of a step's parts takes, evaluation included, and short enough to learn of a rank that hangs.
_TIMEOUT = timedelta(minutes=30)
_BUCKET_NUMBERS = 2**25
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device
    """This process's."""
    mesh: DeviceMesh | None
    """What the student is sharded over; on many machines sharded within each and replicated across them (HSDP).
    None for one process."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: writes files, reports."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, the same bits on each of them."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: float) -> float:
        """The largest on any rank."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def sum_gradients_(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients of replicated parameters over the ranks; those of sharded ones have been summed already."""
        if self.size == 1:
            return
        for bucket in _buckets([p for p in parameters if not isinstance(p, DTensor)]):
            # A rank whose part of the step did not need a parameter still takes part in the sum.
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = self.sum_(torch.cat([g.flatten() for g in gradients]))
            for parameter, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = gradient.view_as(parameter)


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Group the trainable parameters by dtype, in order, into buckets large enough to hide the latency of a sum."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        is_full = sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET_NUMBERS
        if bucket and (is_full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def init_distributed() -> Iterator[Ranks]:
    """Join the other processes for the length of the block, or be alone."""
    on_gpu = torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1, torch.device("cuda" if on_gpu else "cpu"), None)
        return
    rank, per_node = int(os.environ["RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    try:
        if per_node < size:
            mesh = init_device_mesh(device.type, (size // per_node, per_node), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        yield Ranks(rank, size, device, mesh)
    finally:
        dist.destroy_process_group()


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks if it is sharded; then every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, of which a rank keeps what it keeps of `like`, on its device."""
    if isinstance(like, DTensor):
        # Every rank has read the same, so nothing needs to be sent.
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


def machine_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of the host as far as this process's control group may use it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    total = int(psutil.virtual_memory().total)
    if not _CGROUP_LIMIT.is_file():
        return total
    limit = _CGROUP_LIMIT.read_text().strip()
    return total if limit == "max" else min(total, int(limit))


def peak_memory_bytes(device: torch.device) -> int:
    """Most that this process has held so far, of the GPU's memory or of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes (man page getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
