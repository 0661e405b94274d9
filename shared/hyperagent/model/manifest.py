"""What a trained network belongs to: the part of their manifests that checkpoint and bundle share."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from hyperagent.config import StrictModel
from hyperagent.identity import DataIdentity
from hyperagent.model.config import HyperNetworkConfig, LayerInfo

Mode = Literal["from_zero", "warm_start", "static"]
"""A hypernetwork whose adapter starts at zero, one that starts from a static adapter, or a static adapter itself."""


class NetworkManifest(StrictModel):
    """Everything that decides what a network's weights mean."""

    student_weights: str
    """`identity.weights_fingerprint` of the student."""
    data: DataIdentity
    """What it was trained on; the tokenizer's and chat template's digests are in it."""
    mode: Mode = "from_zero"
    warm_start: str | None = None
    """Digest (BLAKE3, hex) of the static adapter's weights file that it started from."""
    hypernetwork: HyperNetworkConfig
    """Rank, alpha and, unless static, shape and featurizer."""
    layers: tuple[LayerInfo, ...]
    """The targets, in the order of the network."""

    @model_validator(mode="after")
    def _warm_start_has_its_adapter(self) -> NetworkManifest:
        if (self.mode == "warm_start") != (self.warm_start is not None):
            raise ValueError(f"mode {self.mode!r} does not go with the static adapter {self.warm_start}")
        return self
