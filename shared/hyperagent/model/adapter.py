"""Hold an adapter in memory: the two LoRA factors of every layer it changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoRAPair:
    """The two factors of one layer's delta, scale * b @ a, with a leading batch axis for a batch of adapters."""

    a: Tensor
    """Factor A, shape [(B,) R, I]."""
    b: Tensor
    """Factor B, shape [(B,) O, R]."""


AdapterWeights = dict[str, LoRAPair]
"""Factors by full module name."""
