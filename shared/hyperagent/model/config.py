"""Define the configuration of a hypernetwork and its target layers for manifests and recipes; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from hyperagent.config import StrictModel
from hyperagent.errors import ConfigError

EMBEDDINGS = "embeddings"
FEATURIZER_PATTERN = rf"^({EMBEDDINGS}|hidden@[1-9][0-9]*)$"
"""Pattern of valid featurizer names."""

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"width": 64, "num_latents": 8, "encoder_blocks": 2, "generator_blocks": 1, "num_heads": 4},
    "small": {"width": 256, "num_latents": 32, "encoder_blocks": 2, "generator_blocks": 2, "num_heads": 4},
    "base": {},
    "flat": {"width": 256, "num_latents": 32, "encoder_blocks": 2, "generator_blocks": 2, "num_heads": 4, "head": "flat"},
}  # fmt: skip


class HyperNetworkConfig(StrictModel):
    """Shape of the hypernetwork; the defaults are those of the preset `base`.

    The field `preset:` selects another preset, and the fields given next to it change single values.

    Parameters, with E the student's hidden size, M layers and S slots (R ranks, or 1 with the flat head):

        encoder    E + E D + neighbors D + L D + encoder_blocks (16 D^2 + 5 D)
        generator  M S D + generator_blocks (20 D^2 + 7 D) + D          flat: 16 D^2 + 5 D per block
        heads      D * sum of (I + O) over the groups                   flat: R times that

    For the 48-layer student (E = 2,048, M = 120, rank 16; shapes 2,048 -> 512, 8,192 and 12,288, and 4,096 -> 2,048,
    together 33,280 inputs and outputs):

        preset      D   L      encoder    generator        heads        total
        tiny       64   8      265,536      205,312    2,129,920    2,600,768
        small     256  32    2,635,008    3,116,800    8,519,680   14,271,488
        base    1,024  64   69,297,152   64,903,168   34,078,720  168,279,040
        flat      256  32    2,635,008    2,130,688  136,314,880  141,080,576
    """

    width: int = Field(1024, ge=16, multiple_of=16)
    """D: size of the hidden vectors."""
    num_latents: int = Field(64, ge=1)
    """L: number of vectors that the prompt is pooled into."""
    encoder_blocks: int = Field(4, ge=1)
    """Number of Perceiver blocks of the encoder."""
    generator_blocks: int = Field(3, ge=1)
    """Number of blocks of the generator; each reads the latents and mixes across layers and ranks."""
    num_heads: int = Field(16, ge=1)
    """Number of attention heads; must divide the width."""
    head: Literal["per_rank", "flat"] = "per_rank"
    """Whether a head generates one rank from each of a layer's R features, or all R ranks from its single feature."""
    head_grouping: Literal["shape", "kind"] = "shape"
    """Which layers share heads: layers of equal shape, or layers of equal name inside their decoder layers."""
    featurizer: str = Field(EMBEDDINGS, pattern=FEATURIZER_PATTERN)
    """Features of a prompt that the encoder reads: "embeddings" or "hidden@K" (`hyperagent.model.featurizer`)."""
    rank: int = Field(16, ge=1)
    """R: rank of the generated adapters."""
    alpha: float = Field(32.0, gt=0)
    """LoRA's alpha; the delta is scaled by alpha / rank, as in PEFT."""
    max_document_frequency: float = Field(0.9, gt=0, le=1)
    """Token ids that occur in a larger share of the training prompts are not read (`hyperagent.model.common_tokens`)."""
    neighbors: int = Field(3, ge=0)
    """Number of preceding tokens whose features are added to those of each token, so that a word is read together with
    the words it belongs to, even with ones that are not read themselves."""

    @classmethod
    def preset(cls, name: str, **changes: Any) -> HyperNetworkConfig:
        """Return the preset with that name and some fields changed.

        Raises:
            ValidationError: there is no preset of that name, or a field is wrong.
        """
        return cls.model_validate({"preset": name, **changes})

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping) or "preset" not in fields:
            return fields
        changes = dict(fields)
        name = changes.pop("preset")
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; choose from {', '.join(PRESETS)}")
        return {**PRESETS[name], **changes}

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> HyperNetworkConfig:
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide width={self.width}; choose a divisor of the width"
            )
        return self

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class LayerInfo:
    """One linear layer that an adapter changes."""

    name: str
    """Full module name inside the student, such as "model.layers.3.self_attn.q_proj"."""
    in_features: int
    out_features: int

    @property
    def depth(self) -> int:
        """Index of the decoder layer that contains it."""
        return int(self._place()[1])

    @property
    def kind(self) -> str:
        """Path inside the decoder layer, such as "self_attn.q_proj"."""
        return self._place()[2]

    def _place(self) -> re.Match[str]:
        place = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(.+)", self.name)
        if place is None:
            raise ConfigError(f"{self.name!r} is not a module of a decoder layer: its name lacks `layers.<index>.`")
        return place
