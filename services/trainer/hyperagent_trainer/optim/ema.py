"""Keep an exponential moving average of the trained weights.

Its first steps follow the weights closely, so that it forgets the initial weights: step n uses the decay
min(decay, (1 + n) / (10 + n)), as TensorFlow does
(https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class WeightAverage:
    """Averages a network's trainable parameters in float32 on their device; of sharded ones each rank averages its part.

    Attributes:
        tensors: the average, by parameter name; empty without a decay, in which case every method does nothing.
        num_updates: number of steps that have gone into the average.
    """

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        """Start from the current weights; shard the network first."""
        self._network, self._decay = network, decay
        self._parameters = {} if decay is None else {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step to the average."""
        if self._decay is None:
            return
        self.num_updates += 1
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Replace the average and the number of updates with a checkpoint's."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])
        self.num_updates = num_updates

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Swap the network's weights with the average within the block; `tensors` then hold the network's own weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if isinstance(self._network, FSDPModule):
            # After a forward pass without a backward pass FSDP still holds the gathered weights, and would use the old ones.
            self._network.reshard()
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(own)
