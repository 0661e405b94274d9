"""Write and read an adapter as the two files of PEFT's format, which PEFT and vLLM both load.

Format: `adapter_config.json` holds a `LoraConfig`, `adapter_model.safetensors` holds
`base_model.model.<module>.lora_A.weight` [R, I] and `.lora_B.weight` [O, R]
(https://huggingface.co/docs/peft/developer_guides/checkpoint).

Only the kind of adapter that this project writes can be read: a plain LoRA of linear layers. PEFT's format has many
variants under the same two file names, and confusing them gives wrong numbers without any error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.errors import ConfigError, CorruptRecord, InvalidRequest
from hyperagent.model.adapter import AdapterWeights, LoRAPair

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
}
"""Settings that are read separately, matter only in training, or have no effect without another setting."""
_PLAIN: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    # These only initialize A; other values also change the base weights, to which the factors then belong.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
"""Allowed values of the other settings in addition to null, false and empty."""


@dataclass(frozen=True)
class AdapterFiles:
    """The content of `adapter_model.safetensors` and `adapter_config.json`."""

    model: bytes
    config: bytes


def encode_adapter(
    weights: AdapterWeights,
    *,
    base_model: str,
    alpha: float,
    origin: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> AdapterFiles:
    """Serialize one adapter.

    Args:
        weights: float a [R, I] and b [O, R] by full module name.
        base_model: name of the student that the adapter belongs to.
        alpha: LoRA's alpha; the delta is scaled by alpha / rank.
        origin: fingerprints of the artifacts that made the adapter; stored in the metadata of
            `adapter_model.safetensors`, since PEFT and vLLM reject unknown names in `adapter_config.json`.
        dtype: of the factors in the file; by default their own.

    Raises:
        InvalidRequest: there are no factors, or their ranks differ.
        CorruptRecord: a number is not finite.
    """
    ranks = {pair.a.shape[0] for pair in weights.values()} | {pair.b.shape[1] for pair in weights.values()}
    if len(ranks) != 1:
        raise InvalidRequest(f"an adapter needs one rank for all its layers, not {sorted(ranks)}")
    tensors = {}
    for name, pair in weights.items():
        if not (pair.a.isfinite().all() and pair.b.isfinite().all()):
            raise CorruptRecord(
                f"the adapter's factors at {name} are not finite; train or export the hypernetwork again"
            )
        tensors[_PREFIX + name + _A] = pair.a.detach().to(dtype or pair.a.dtype).contiguous()
        tensors[_PREFIX + name + _B] = pair.b.detach().to(dtype or pair.b.dtype).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        # Full names, since a suffix such as "out_proj" could also match a layer that the adapter does not change.
        "target_modules": sorted(weights),
    }
    model = _with_ordered_metadata(save(tensors, metadata={"format": "pt", **origin}))
    return AdapterFiles(model=model, config=(json.dumps(config, indent=2) + "\n").encode())


def _with_ordered_metadata(content: bytes) -> bytes:
    """Return a safetensors file with sorted metadata; the library writes them in an order that changes between calls.

    Equal adapters are then equal files, which digests and ETags rely on. The layout is an 8-byte little-endian
    length and a JSON header of that length, padded with spaces (https://github.com/huggingface/safetensors#format).
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(ordered) <= length
    return content[:8] + ordered.ljust(length) + content[8 + length :]


@dataclass(frozen=True, eq=False)
class ImportedAdapter:
    """The content of a PEFT folder."""

    weights: AdapterWeights
    """Factors a [R, I] and b [O, R] by full module name, in name order, in the file's dtype."""
    rank: int
    alpha: float
    base_model: str
    """Name of the student that the adapter belongs to; empty if the folder does not name it."""
    fingerprint: str
    """BLAKE3 digest (hex) of `adapter_model.safetensors`."""


def read_adapter(folder: Path) -> ImportedAdapter:
    """Read one adapter, written by `encode_adapter` or by PEFT's `save_pretrained`.

    Raises:
        ConfigError: there is no such adapter, or it is not plain LoRA on linear layers but, for example, rsLoRA, DoRA,
            with biases, with whole modules, or with ranks that differ between layers.
        CorruptRecord: a file is damaged, or the two contradict each other.
    """
    source = folder / CONFIG_FILE
    config_bytes, model_bytes = _content(source), _content(folder / MODEL_FILE)
    try:
        config = json.loads(config_bytes)
    except ValueError as error:
        raise CorruptRecord(f"{source} is not JSON: {error}; save the adapter again") from error
    if not isinstance(config, dict):
        raise CorruptRecord(f"{source} holds a {type(config).__name__} instead of settings; save the adapter again")
    rank, alpha = _plain_lora(config, source)
    try:
        tensors = load(model_bytes)
    except (SafetensorError, ValueError) as error:
        raise CorruptRecord(f"{folder / MODEL_FILE} is not a safetensors file: {error}; copy it again") from error
    weights = _pairs(tensors, rank, folder / MODEL_FILE)
    _check_targets(config.get("target_modules"), weights, source)
    return ImportedAdapter(
        weights=weights,
        rank=rank,
        alpha=alpha,
        base_model=config.get("base_model_name_or_path") or "",
        fingerprint=blake3(model_bytes).hexdigest(),
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; give a PEFT folder with {CONFIG_FILE} and {MODEL_FILE}"
        ) from error


def _plain_lora(config: dict[str, Any], source: Path) -> tuple[int, float]:
    """Return rank and alpha of a config, or refuse one that is not plain LoRA."""
    if config.get("peft_type") != "LORA" or config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ConfigError(
            f"{source} has type {config.get('peft_type')!r} for {config.get('task_type')!r}; give a LORA adapter for CAUSAL_LM"
        )
    for name, value in config.items():
        # An unknown setting is harmless only if it is not set.
        if name not in _WITHOUT_EFFECT and value and value not in _PLAIN.get(name, ()):
            raise ConfigError(f"{source} sets {name} to {value!r}; give an adapter that is plain LoRA without it")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CorruptRecord(
            f"{source} has the rank r = {rank!r}, which is not a positive integer; save the adapter again"
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not (math.isfinite(alpha) and alpha > 0):
        raise CorruptRecord(
            f"{source} has lora_alpha = {alpha!r}, which is not a positive number; save the adapter again"
        )
    base_model = config.get("base_model_name_or_path")
    if not isinstance(base_model, str | None):
        raise CorruptRecord(
            f"{source} names {base_model!r} as its base model, which is not a string; save the adapter again"
        )
    return rank, float(alpha)


def _pairs(tensors: dict[str, Tensor], rank: int, source: Path) -> AdapterWeights:
    names = sorted(key[len(_PREFIX) : -len(_A)] for key in tensors if key.startswith(_PREFIX) and key.endswith(_A))
    expected = {_PREFIX + name + factor for name in names for factor in (_A, _B)}
    if differing := sorted(expected ^ set(tensors)):
        raise CorruptRecord(
            f"{source} {'lacks' if differing[0] in expected else 'has the unknown'} tensor {differing[0]}; "
            f"give a file with one {_PREFIX}<module>{_A} and one {_B} per layer and nothing else"
        )
    if not names:
        raise CorruptRecord(f"{source} has no factors; save the adapter again")
    weights = {name: LoRAPair(tensors[_PREFIX + name + _A], tensors[_PREFIX + name + _B]) for name in names}
    for name, pair in weights.items():
        shapes = list(pair.a.shape), list(pair.b.shape)
        if pair.a.dim() != 2 or pair.b.dim() != 2 or (pair.a.shape[0], pair.b.shape[1]) != (rank, rank):
            raise CorruptRecord(
                f"{source} has factors of shapes {shapes[0]} and {shapes[1]} at {name}, not [{rank}, I] and [O, {rank}] "
                f"as r in {CONFIG_FILE} says; the two files do not belong together"
            )
        if not {pair.a.dtype, pair.b.dtype} <= set(_DTYPES):
            raise CorruptRecord(
                f"{source} has factors of {pair.a.dtype} and {pair.b.dtype} at {name}; save it in float32 or bfloat16"
            )
        if not (pair.a.isfinite().all() and pair.b.isfinite().all()):
            raise CorruptRecord(f"{source} has factors at {name} that are not finite; train the adapter again")
    return weights


def _check_targets(targets: object, weights: AdapterWeights, source: Path) -> None:
    """Check that the target modules select exactly the layers that have factors.

    As in PEFT, a string is a regular expression for the whole name, and a list entry is a name or its last parts.
    """
    if isinstance(targets, str):
        try:
            unmatched = [name for name in weights if re.fullmatch(targets, name) is None]
        except re.error as error:
            raise CorruptRecord(
                f"{source} has target_modules {targets!r}, not a regular expression: {error}; save the adapter again"
            ) from error
        idle: list[str] = []
    elif isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        chosen = {name: {t for t in targets if name == t or name.endswith(f".{t}")} for name in weights}
        unmatched = [name for name, by in chosen.items() if not by]
        idle = sorted(set(targets) - set().union(*chosen.values()))
    else:
        raise CorruptRecord(f"{source} has target_modules {targets!r}, not a list of names; save the adapter again")
    if unmatched or idle:
        what = f"there are factors for {unmatched[0]}" if unmatched else f"there are no factors for {idle[0]}"
        raise CorruptRecord(f"{source} and {MODEL_FILE} disagree on the target_modules: {what}; save the adapter again")
