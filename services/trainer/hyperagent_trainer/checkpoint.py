"""Checkpoints: hypernetwork, optimiser and step, whole or not at all; never the student.

checkpoint.json           format version, step, digests of recipe, data and files
hypernetwork.safetensors  weights
optimizer.safetensors     AdamW's moments and step counts, as <parameter>.<name>
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import load, save
from torch import Tensor, nn

from hyperagent.errors import ConfigError, CorruptRecord
from hyperagent.files import new_directory
from hyperagent.identity import canonical_json, require_same
from hyperagent_trainer.config import TrainRecipe

FORMAT_VERSION = 2


def save_checkpoint(
    folder: Path,
    *,
    hypernetwork: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    recipe: TrainRecipe,
    data: str,
) -> None:
    """Write a checkpoint after `step` optimiser steps, replacing the one before.

    Args:
        data: fingerprint of the data trained on.

    Raises:
        StorageError: the file system refused; the one before still stands.
    """
    moments: dict[str, Tensor] = {}
    for name, parameter in hypernetwork.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}.{key}"] = value.detach().cpu().contiguous()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in hypernetwork.state_dict().items()}
    contents = {"hypernetwork.safetensors": save(weights), "optimizer.safetensors": save(moments)}
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "recipe": _digest(recipe),
        "data": data,
        "files": {name: blake3(content).hexdigest() for name, content in contents.items()},
    }
    with new_directory(folder) as aside:
        for name, content in contents.items():
            (aside / name).write_bytes(content)
        (aside / "checkpoint.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(
    folder: Path, *, hypernetwork: nn.Module, optimizer: torch.optim.Optimizer, recipe: TrainRecipe, data: str
) -> int:
    """Restore hypernetwork and optimiser; returns the number of steps done.

    Raises:
        ConfigError: the checkpoint is of another recipe or format.
        IdentityMismatch: it was trained on other data.
        CorruptRecord: a file is not the one that was written.
    """
    manifest = json.loads((folder / "checkpoint.json").read_bytes())
    if manifest["format_version"] != FORMAT_VERSION or manifest["recipe"] != _digest(recipe):
        raise ConfigError(f"the checkpoint in {folder} is of another recipe or release; start a new run")
    require_same(
        f"the data of the checkpoint in {folder}",
        expected=manifest["data"],
        found=data,
        remedy="restore the tokens file, or start a new run",
    )
    contents = {}
    for name, digest in manifest["files"].items():
        contents[name] = (folder / name).read_bytes()
        if blake3(contents[name]).hexdigest() != digest:
            raise CorruptRecord(f"{folder / name} is not the file that was written; start a new run")
    hypernetwork.load_state_dict(load(contents["hypernetwork.safetensors"]), strict=True)
    moments = load(contents["optimizer.safetensors"])
    for name, parameter in hypernetwork.named_parameters():
        state = {
            key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in moments
        }
        if state:
            # AdamW keeps its step count on the CPU and its moments beside the parameter.
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
    return int(manifest["step"])


def _digest(recipe: TrainRecipe) -> str:
    return blake3(canonical_json(recipe.model_dump(mode="json"))).hexdigest()
