"""Join the processes that train together: one on a laptop, one per GPU under torchrun, on one machine or many.

torchrun passes rank and world size in environment variables (https://docs.pytorch.org/docs/stable/elastic/run.html).
Without them there is one process and no process group, and the collective operations below do nothing.
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

# Longer than any part of a step takes, evaluation included, and short enough to detect a rank that hangs.
_TIMEOUT = timedelta(minutes=30)
_BUCKET_NUMBERS = 2**25
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the collective operations over all ranks."""

    rank: int
    """Rank of this process, from 0."""
    size: int
    """Number of ranks."""
    device: torch.device
    """Device of this process."""
    mesh: DeviceMesh | None
    """Mesh over which the student is sharded; with many machines, sharded within each and replicated across them (HSDP).
    None for one process."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and reports for all ranks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place; the result has the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: float) -> float:
        """Return the largest value of `number` on any rank."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def sum_gradients_(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients of replicated parameters over the ranks; those of sharded parameters are already summed."""
        if self.size == 1:
            return
        for bucket in _buckets([p for p in parameters if not isinstance(p, DTensor)]):
            # A rank whose part of the step did not use a parameter must still take part in the sum.
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
    """Join the process group of torchrun for the duration of the block; without torchrun, yield a single rank.

    After an exception the group is not left, and the process must end at once.
    """
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
    if per_node < size:
        mesh = init_device_mesh(device.type, (size // per_node, per_node), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    yield Ranks(rank, size, device, mesh)
    # Not after an exception: with NCCL it waits for the operations in progress, up to the timeout of half an hour, and hides
    # the reason for as long.
    dist.destroy_process_group()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered from all ranks if it is sharded; a collective call that every rank must make."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Place a whole tensor on the device of `like`, sharded as `like` is."""
    if isinstance(like, DTensor):
        # Every rank has read the same, so nothing needs to be sent.
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


def machine_bytes(device: torch.device) -> int:
    """Return the bytes of memory of the GPU, or of the host up to the limit of this process's control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    total = int(psutil.virtual_memory().total)
    if not _CGROUP_LIMIT.is_file():
        return total
    limit = _CGROUP_LIMIT.read_text().strip()
    return total if limit == "max" else min(total, int(limit))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process so far, in bytes of the GPU's memory or of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes (man page getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
