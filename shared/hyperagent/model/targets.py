"""Find the linear layers of the student that an adapter changes.

Qwen3-Next mixes two kinds of decoder layers, and only one in four has `q_proj`; the others are Gated DeltaNet layers
with `in_proj_qkvz` and `out_proj` (transformers, `modeling_qwen3_next.py`). A list of attention names alone would leave
three quarters of the student unchanged without any error, so discovery is strict: every decoder layer must be reached,
every name must be found, and every layer must have the shape that follows from the student's config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hyperagent.architecture import attention_widths, decoder_prefix, linear_attention_widths
from hyperagent.errors import ConfigError
from hyperagent.model.config import LayerInfo

Shape = tuple[int, int]
"""(in_features, out_features)."""


def _attention(config: Any, *, query_gate: bool = False) -> dict[str, Shape]:
    """Return the projections of (grouped-query) softmax attention; with a gate, q_proj includes the output gate."""
    query, key = attention_widths(config)
    return {
        "self_attn.q_proj": (config.hidden_size, 2 * query if query_gate else query),
        "self_attn.k_proj": (config.hidden_size, key),
        "self_attn.v_proj": (config.hidden_size, key),
        "self_attn.o_proj": (query, config.hidden_size),
    }


def _mlp(path: str, hidden_size: int, intermediate_size: int) -> dict[str, Shape]:
    return {
        f"{path}.gate_proj": (hidden_size, intermediate_size),
        f"{path}.up_proj": (hidden_size, intermediate_size),
        f"{path}.down_proj": (intermediate_size, hidden_size),
    }


def _dense_shapes(config: Any) -> dict[str, Shape]:
    return _attention(config) | _mlp("mlp", config.hidden_size, config.intermediate_size)


def _qwen3_next_shapes(config: Any) -> dict[str, Shape]:
    key, value = linear_attention_widths(config)
    return (
        _attention(config, query_gate=True)
        | {
            # Query, key, value and output gate z in one projection, interleaved by key head.
            "linear_attn.in_proj_qkvz": (config.hidden_size, 2 * key + 2 * value),
            "linear_attn.in_proj_ba": (config.hidden_size, 2 * config.linear_num_value_heads),
            "linear_attn.out_proj": (value, config.hidden_size),
        }
        | _mlp("mlp.shared_expert", config.hidden_size, config.shared_expert_intermediate_size)
    )


@dataclass(frozen=True)
class _Architecture:
    shapes: Callable[[Any], Mapping[str, Shape]]
    """Function from the config to the shapes of all projections that may be adapted, by path inside a decoder layer."""
    targets: tuple[str, ...]
    """Paths of the projections that are adapted by default."""


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LLAMA_LIKE = _Architecture(_dense_shapes, _ATTENTION)

ARCHITECTURES: dict[str, _Architecture] = {
    # Not adapted by default: in_proj_ba, whose 64 outputs control the recurrence's decay and which not every server
    # applies an adapter to, and the shared expert, which adds a third to the adapter's size.
    "qwen3_next": _Architecture(_qwen3_next_shapes, (*_ATTENTION, "linear_attn.in_proj_qkvz", "linear_attn.out_proj")),
    "qwen3_moe": _Architecture(_attention, _ATTENTION),
    "qwen3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
}
"""Supported student architectures, by `model_type`."""

_NEVER = (
    (
        r"(.*\.)?mlp\.(gate|router|shared_expert_gate)(\..*)?",
        "it decides which experts a token is sent to, or the weight of the shared expert: routing must stay that of the "
        "student, and the router is not a linear layer but a module with a weight and a top-k",
    ),
    (
        r"(.*\.)?mlp\.experts(\..*)?",
        "the routed experts are fused three-dimensional parameters, not linear layers, and each sees only the tokens "
        "routed to it",
    ),
)
"""Patterns of modules that are never adapted in any student, each with the reason."""


def discover_target_layers(student: PreTrainedModel, targets: Sequence[str] | None = None) -> list[LayerInfo]:
    """Find the student's target layers, in the order of its layers.

    Args:
        targets: paths inside a decoder layer, such as "self_attn.q_proj"; by default those of the model type.

    Raises:
        ConfigError: the model type is unknown, a path may not be adapted, is listed twice or matches no layer, a
            decoder layer has none of the paths or only some of the paths within one of its parts, or a match is not
            a plain linear layer of the shape that the config implies.
    """
    model_type = str(student.config.model_type)
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"students of type {model_type!r} are not supported; use one of type {', '.join(ARCHITECTURES)}"
        )
    shapes = ARCHITECTURES[model_type].shapes(student.config)
    targets = ARCHITECTURES[model_type].targets if targets is None else tuple(targets)
    _check_names(targets, shapes, model_type)
    prefix = decoder_prefix(student)
    found: list[LayerInfo] = []
    for index, layer in enumerate(student.get_decoder().layers):
        modules = dict(layer.named_modules())
        # Only the targets in parts that the layer has: an attention layer has no projections of a DeltaNet layer.
        here = [path for path in targets if path.rpartition(".")[0] in modules]
        if not here:
            raise ConfigError(
                f"decoder layer {index} of the {model_type} student has none of the targets {', '.join(targets)}; add its projections"
            )
        for path in here:
            name = f"{prefix}.layers.{index}.{path}".lstrip(".")
            found.append(_layer_info(name, modules.get(path), shapes[path]))
    reached = {layer.kind for layer in found}
    if unknown := [path for path in targets if path not in reached]:
        raise ConfigError(
            f"no decoder layer of this {model_type} student has {', '.join(unknown)}; leave it out of the targets"
        )
    return found


def num_adapter_parameters(layers: Iterable[LayerInfo], rank: int) -> int:
    """Return the number of parameters of one adapter for these layers."""
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def _check_names(targets: Sequence[str], shapes: Mapping[str, Shape], model_type: str) -> None:
    if not targets:
        raise ConfigError("the list of targets is empty; name projections, or leave the list out for the default ones")
    for path in targets:
        for pattern, reason in _NEVER:
            if re.fullmatch(pattern, path):
                raise ConfigError(f"target {path} is never adapted: {reason}; leave it out of the targets")
        if path not in shapes:
            raise ConfigError(
                f"the {model_type} student has no projection {path} that can be adapted; choose from {', '.join(shapes)}"
            )
        if targets.count(path) > 1:
            raise ConfigError(f"target {path} is listed twice; list it once")


def _layer_info(name: str, module: nn.Module | None, shape: Shape) -> LayerInfo:
    if module is None:
        raise ConfigError(
            f"the student lacks {name}, which every decoder layer of this kind must have; check its weights"
        )
    # A subclass (quantized or already adapted) may compute something other than x @ W.T.
    if type(module) is not nn.Linear:
        raise ConfigError(
            f"target {name} is a {type(module).__name__}, not a plain linear layer; load the student without quantization or adapters"
        )
    if (module.in_features, module.out_features) != shape:
        raise ConfigError(
            f"target {name} maps {module.in_features} to {module.out_features} features, but the student's config "
            f"implies {shape[0]} to {shape[1]}; use the config that belongs to the weights"
        )
    return LayerInfo(name, *shape)
