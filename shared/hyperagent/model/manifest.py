"""Define the part of their manifests that checkpoints and bundles share."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from hyperagent.config import StrictModel
from hyperagent.identity import DataIdentity
from hyperagent.model.config import HyperNetworkConfig, LayerInfo

Mode = Literal["from_zero", "warm_start", "static"]
"""A hypernetwork whose adapter starts at zero, a hypernetwork that starts from a static adapter, or a static adapter."""


class NetworkManifest(StrictModel):
    """Everything needed to interpret a network's weights."""

    student_weights: str
    """Fingerprint of the student's weights (`identity.weights_fingerprint`)."""
    data: DataIdentity
    """Identity of the training data, with the digests of tokenizer and chat template."""
    mode: Mode = "from_zero"
    warm_start: str | None = None
    """Digest (BLAKE3, hex) of the weights file of the static adapter that the network started from."""
    hypernetwork: HyperNetworkConfig
    """Rank and alpha and, unless the mode is static, shape and featurizer."""
    layers: tuple[LayerInfo, ...]
    """Target layers, in the order of the student's layers."""

    @model_validator(mode="after")
    def _warm_start_has_its_adapter(self) -> NetworkManifest:
        if (self.mode == "warm_start") != (self.warm_start is not None):
            raise ValueError(
                f"mode {self.mode!r} contradicts the static adapter {self.warm_start}; only warm_start has one"
            )
        return self
