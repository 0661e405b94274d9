"""An adapter as the two files of PEFT's format, which PEFT and vLLM both load.

Format: `adapter_config.json` holds a `LoraConfig`, `adapter_model.safetensors` holds
`base_model.model.<module>.lora_A.weight` [R, I] and `.lora_B.weight` [O, R]
(https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import save

from hyperagent.errors import CorruptRecord, InvalidRequest
from hyperagent.model.adapter import AdapterWeights


@dataclass(frozen=True)
class AdapterFiles:
    """The content of `adapter_model.safetensors` and `adapter_config.json`."""

    model: bytes
    config: bytes


def encode_adapter(
    weights: AdapterWeights, *, base_model: str, alpha: float, origin: Mapping[str, str]
) -> AdapterFiles:
    """Serialise one adapter.

    Args:
        base_model: name of the student it belongs to.
        origin: fingerprints of what it was made by; kept in the metadata of `adapter_model.safetensors`, since PEFT
            and vLLM take no unknown names in `adapter_config.json`.

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
                f"the adapter's factors at {name} are not finite; the hypernetwork's checkpoint is broken"
            )
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.a.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.b.detach().contiguous()
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
        # Full names: a suffix such as "out_proj" could also match a layer the adapter does not change.
        "target_modules": sorted(weights),
    }
    model = _with_ordered_metadata(save(tensors, metadata={"format": "pt", **origin}))
    return AdapterFiles(model=model, config=(json.dumps(config, indent=2) + "\n").encode())


def _with_ordered_metadata(content: bytes) -> bytes:
    """A safetensors file whose metadata stand in order: the library writes them in one that changes from call to call.

    Equal adapters are then equal files, as their digests and ETags promise. The layout is an 8-byte little-endian
    length and a JSON header of that length, padded with spaces (https://github.com/huggingface/safetensors#format).
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(ordered) <= length
    return content[:8] + ordered.ljust(length) + content[8 + length :]
