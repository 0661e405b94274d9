"""Which linear layers of the student an adapter changes.

Qwen3-Next mixes two kinds of decoder layer, and only one of four has `q_proj`; the others are Gated DeltaNet
layers with `in_proj_qkvz` and `out_proj` (transformers, `modeling_qwen3_next.py`). A list of attention names
alone would leave three quarters of the student untouched without any error, so discovery is strict: every
decoder layer must be reached and every name must be found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hyperagent.errors import ConfigError

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")

DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    # in_proj_ba steers the recurrence's decay with 64 outputs, and not every server applies an adapter to it; the
    # routed experts are one fused parameter, not linear layers. Both are left alone.
    "qwen3_next": (*_ATTENTION, "linear_attn.in_proj_qkvz", "linear_attn.out_proj"),
    "qwen3_moe": _ATTENTION,
    "qwen3": _ATTENTION,
    "llama": _ATTENTION,
}
"""Projections adapted by default, by `model_type`, as paths inside a decoder layer."""


@dataclass(frozen=True)
class LayerInfo:
    """One linear layer that an adapter changes."""

    name: str
    """Full module name inside the student, such as "model.layers.3.self_attn.q_proj"."""
    in_features: int
    out_features: int


def discover_target_layers(student: PreTrainedModel, targets: Sequence[str] | None = None) -> list[LayerInfo]:
    """Find the student's target layers, in the order of the network.

    Args:
        targets: paths inside a decoder layer, such as "self_attn.q_proj"; by default those of the model's type.

    Raises:
        ConfigError: the model type has no default, a path matches no layer, a decoder layer has none of the
            paths, or a match is not a plain linear layer.
    """
    model_type = str(student.config.model_type)
    if targets is None:
        if model_type not in DEFAULT_TARGETS:
            raise ConfigError(
                f"there are no default targets for {model_type!r} students; name them in the recipe (known: {', '.join(DEFAULT_TARGETS)})"
            )
        targets = DEFAULT_TARGETS[model_type]
    prefix = next((name for name, module in student.named_modules() if module is student.get_decoder()), "")
    found: list[LayerInfo] = []
    matched: set[str] = set()
    for index, layer in enumerate(student.get_decoder().layers):
        modules = dict(layer.named_modules())
        here = [path for path in targets if path in modules]
        if not here:
            raise ConfigError(
                f"decoder layer {index} of the {model_type} student has none of the targets {', '.join(targets)}; add its projections"
            )
        for path in here:
            module = modules[path]
            if type(module) is not nn.Linear:
                raise ConfigError(
                    f"target {path} of layer {index} is a {type(module).__name__}, not a linear layer; leave it out of the targets"
                )
            found.append(LayerInfo(f"{prefix}.layers.{index}.{path}", module.in_features, module.out_features))
        matched.update(here)
    if unknown := [path for path in targets if path not in matched]:
        raise ConfigError(f"the {model_type} student has no layer {', '.join(unknown)}; correct the targets")
    return found
