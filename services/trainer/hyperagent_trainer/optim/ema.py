"""The exponential moving average of what is trained.

Its first steps follow the weights closely, so that it forgets the start: the n-th uses min(decay, (1 + n) / (10 + n)), as
TensorFlow's does (https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class WeightAverage:
    """Averages a network's trainable parameters, float32, where they are: of sharded ones each rank its part.

    Attributes:
        tensors: the average, by parameter; empty without a decay, and then nothing costs anything.
        num_updates: how many steps have gone into it.
    """

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        """Begin with the weights as they are; a network that is to be sharded has to be already."""
        self._network, self._decay = network, decay
        self._parameters = {} if decay is None else {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        if self._decay is None:
            return
        self.num_updates += 1
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Go on from a checkpoint's."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])
        self.num_updates = num_updates

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the network computes with the average, and `tensors` are its own weights, which it has again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if isinstance(self._network, FSDPModule):
            # After a forward pass without a backward pass it still holds gathered weights, and would go on with those.
            self._network.reshard()
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(own)
