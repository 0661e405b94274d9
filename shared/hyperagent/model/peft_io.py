"""An adapter as the two files of PEFT's format, which PEFT and vLLM both load.

Format: `adapter_config.json` holds a `LoraConfig`, `adapter_model.safetensors` holds
`base_model.model.<module>.lora_A.weight` [R, I] and `.lora_B.weight` [O, R]
(https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from safetensors.torch import save

from hyperagent.errors import CorruptRecord, InvalidRequest
from hyperagent.model.hypernetwork import AdapterWeights


@dataclass(frozen=True)
class AdapterFiles:
    """The content of `adapter_model.safetensors` and `adapter_config.json`."""

    model: bytes
    config: bytes


def encode_adapter(weights: AdapterWeights, *, base_model: str, alpha: float) -> AdapterFiles:
    """Serialise one adapter; `base_model` names the student it belongs to.

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
    return AdapterFiles(
        model=save(tensors, metadata={"format": "pt"}), config=(json.dumps(config, indent=2) + "\n").encode()
    )
