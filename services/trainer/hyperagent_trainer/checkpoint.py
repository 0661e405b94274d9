"""Checkpoints: network, optimiser and step, whole or not at all; never the student.

checkpoint.json         manifest: what the network belongs to, recipe, step, and a digest of every other file
network.safetensors     weights of the hypernetwork or the static adapter
optimizer.safetensors   AdamW's moments and step counts, as <parameter>.<name>
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from blake3 import blake3
from pydantic import Field
from pydantic_core import to_jsonable_python
from safetensors.torch import load, save
from torch import Tensor, nn

from hyperagent.config import parse
from hyperagent.errors import ConfigError, CorruptRecord, NotFound
from hyperagent.files import new_directory
from hyperagent.identity import canonical_json, require_same
from hyperagent.model.manifest import NetworkManifest
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.early_stop import BestEvaluation
from hyperagent_trainer.ranks import placed_like, whole

FORMAT_VERSION = 3
# More than two renames take.
_REPLACED_S = 0.1


class CheckpointManifest(NetworkManifest):
    """What `checkpoint.json` holds."""

    format_version: int = FORMAT_VERSION
    recipe: str
    """Digest of the recipe."""
    step: int = Field(ge=0)
    """Optimiser steps done."""
    best: BestEvaluation = BestEvaluation()
    files: dict[str, str]
    """BLAKE3 (hex) of every other file."""


def save_checkpoint(
    folder: Path,
    *,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    recipe: TrainRecipe,
    belongs_to: NetworkManifest,
    best: BestEvaluation = BestEvaluation(),
    is_first: bool = True,
) -> None:
    """Write a checkpoint after `step` optimiser steps, replacing the one before.

    It holds whole tensors, so that it can be resumed on any number of ranks.

    Args:
        is_first: whether this is the rank that writes. Every rank has to call, to hand in its parts.

    Raises:
        StorageError: the file system refused; the one before still stands.
    """
    weights = {name: _on_host(tensor) for name, tensor in network.state_dict().items()}
    moments: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}.{key}"] = _on_host(value)
    if not is_first:
        return
    contents = {"network.safetensors": save(weights), "optimizer.safetensors": save(moments)}
    manifest = CheckpointManifest(
        **dict(belongs_to),
        recipe=_digest(recipe),
        step=step,
        best=best,
        files={name: blake3(content).hexdigest() for name, content in contents.items()},
    )
    with new_directory(folder) as aside:
        for name, content in contents.items():
            (aside / name).write_bytes(content)
        (aside / "checkpoint.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_checkpoint(
    folder: Path,
    *,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: TrainRecipe,
    belongs_to: NetworkManifest,
) -> CheckpointManifest:
    """Restore network and optimiser.

    Raises:
        ConfigError: the checkpoint is of another recipe or format.
        IdentityMismatch: it is of another student, other data, other targets, or another static adapter.
        CorruptRecord: a file is not the one that was written.
    """
    manifest = _read_manifest(folder)
    if manifest.recipe != _digest(recipe):
        raise ConfigError(f"the checkpoint in {folder} is of another recipe; start a new run")
    for name in type(belongs_to).model_fields:
        require_same(
            f"{name} of the checkpoint in {folder}",
            expected=_brief(getattr(manifest, name)),
            found=_brief(getattr(belongs_to, name)),
            remedy="restore what the run was started with, or start a new run",
        )
    contents = _read_contents(folder, manifest)
    weights, state_dict = load(contents["network.safetensors"]), network.state_dict()
    network.load_state_dict(
        {name: placed_like(tensor, state_dict.get(name, tensor)) for name, tensor in weights.items()}, strict=True
    )
    moments = load(contents["optimizer.safetensors"])
    for name, parameter in network.named_parameters():
        state = {
            key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in moments
        }
        if state:
            # AdamW keeps its step count on the CPU and its moments beside the parameter.
            optimizer.state[parameter] = {k: v if k == "step" else placed_like(v, parameter) for k, v in state.items()}
    return manifest


def read_network(folder: Path) -> tuple[CheckpointManifest, dict[str, Tensor]]:
    """A checkpoint's manifest and the network's weights, also while the run replaces it by newer ones.

    Raises:
        NotFound: there is none.
        ConfigError: it is of another release's format.
        CorruptRecord: a file is missing, or is not the one that was written.
    """
    before: bytes | None = b""
    while True:
        try:
            found: bytes | None = (folder / "checkpoint.json").read_bytes()
        except FileNotFoundError:
            found = None
        try:
            manifest = _read_manifest(folder)
            return manifest, load(_read_contents(folder, manifest)["network.safetensors"])
        except CorruptRecord:
            # Not one checkpoint's files, unless the same one stands there still; or the moment between two renames.
            if found == before:
                if found is None:
                    raise NotFound(f"there is no checkpoint in {folder}") from None
                raise
        before = found
        time.sleep(_REPLACED_S)


def _read_contents(folder: Path, manifest: CheckpointManifest) -> dict[str, bytes]:
    contents = {}
    for name, digest in manifest.files.items():
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise CorruptRecord(f"{folder / name} cannot be read: {error.strerror}; start a new run") from error
        if blake3(contents[name]).hexdigest() != digest:
            raise CorruptRecord(f"{folder / name} is not the file that was written; start a new run")
    return contents


def _on_host(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().contiguous()


def _read_manifest(folder: Path) -> CheckpointManifest:
    path = folder / "checkpoint.json"
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptRecord(f"{path} cannot be read: {error}; start a new run") from error
    if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"the checkpoint in {folder} is of another release's format; start a new run")
    return parse(raw, CheckpointManifest, source=str(path))


def _brief(value: object) -> object:
    """A field as one shows it: long ones by their digests."""
    if value is None or isinstance(value, str):
        return value
    return blake3(canonical_json(to_jsonable_python(value))).hexdigest()


def _digest(recipe: TrainRecipe) -> str:
    return blake3(canonical_json(recipe.model_dump(mode="json"))).hexdigest()
