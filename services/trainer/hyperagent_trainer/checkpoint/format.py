"""Write and read checkpoints atomically: network, optimizer and step, but not the student.

checkpoint.json         manifest: the student and data of the network, recipe, step, and a digest of every other file
network.safetensors     weights of the hypernetwork or the static adapter
optimizer.safetensors   AdamW's moments and step counts, as <parameter>.<name>
average.safetensors     with `ema_decay`: the average of the weights
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from pydantic import Field
from pydantic_core import to_jsonable_python
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperagent.config import parse
from hyperagent.errors import ConfigError, CorruptRecord
from hyperagent.identity import canonical_json, require_same
from hyperagent.model.manifest import NetworkManifest
from hyperagent.storage.files import new_directory
from hyperagent_trainer.checkpoint.best import BestEvaluation
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.distributed import full_tensor, placed_like
from hyperagent_trainer.optim.ema import WeightAverage

FORMAT_VERSION = 3

_AVERAGE = "average.safetensors"
_RESUME_EARLIER = "delete its folder to resume from the previous checkpoint, if there is one, or start a new run"


class CheckpointManifest(NetworkManifest):
    """Contents of `checkpoint.json`."""

    format_version: int = FORMAT_VERSION
    recipe: str
    """Digest of the recipe."""
    step: int = Field(ge=0)
    """Optimizer steps done."""
    best: BestEvaluation = BestEvaluation()
    num_averaged: int = Field(0, ge=0)
    """Number of steps that have gone into the average of the weights."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of the process that wrote the checkpoint, because the last bits of sums depend on them; None in
    checkpoints of earlier releases."""
    files: dict[str, str]
    """BLAKE3 (hex) of every other file."""


@dataclass(frozen=True)
class Snapshot:
    """A copy on the host of the training state after some step, which further steps do not change."""

    weights: dict[str, Tensor]
    """The network's state dict."""
    moments: dict[str, Tensor]
    """AdamW's moments and step counts, as <parameter>.<name>."""
    average: dict[str, Tensor]
    """The average of the weights; empty without `ema_decay`."""
    num_averaged: int
    """Number of steps that have gone into the average."""
    num_threads: int
    """CPU threads of the training thread; another thread may have a different number."""


def snapshot(
    network: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage, *, is_first: bool = True
) -> Snapshot | None:
    """Copy the training state as whole tensors, so that it can be resumed on any number of ranks.

    Every rank must call this, because sharded tensors are gathered.

    Args:
        is_first: whether this is the rank that keeps the copy; the others return None.
    """
    weights = _gather(network.state_dict().items(), is_first=is_first)
    moments = _gather(
        (
            (f"{name}.{key}", value)
            for name, parameter in network.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        ),
        is_first=is_first,
    )
    averages = _gather(average.tensors.items(), is_first=is_first)
    return Snapshot(weights, moments, averages, average.num_updates, torch.get_num_threads()) if is_first else None


def _gather(tensors: Iterable[tuple[str, Tensor]], *, is_first: bool) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in tensors:
        gathered = full_tensor(tensor.detach())
        if is_first:
            kept[name] = gathered.to("cpu", copy=True).contiguous()
    return kept


def write_checkpoint(
    folder: Path,
    found: Snapshot,
    *,
    step: int,
    recipe: TrainRecipe,
    network_manifest: NetworkManifest,
    best: BestEvaluation = BestEvaluation(),
) -> None:
    """Write the snapshot taken after `step` optimizer steps.

    Raises:
        StorageError: the file system reported an error; nothing of the folder is left.
    """
    with new_directory(folder) as temporary:
        files = {"network.safetensors": found.weights, "optimizer.safetensors": found.moments}
        if found.average:
            files[_AVERAGE] = found.average
        for name, tensors in files.items():
            _save(tensors, temporary / name)
        manifest = CheckpointManifest(
            **dict(network_manifest),
            recipe=_digest(recipe),
            step=step,
            best=best,
            num_averaged=found.num_averaged,
            num_threads=found.num_threads,
            files={name: _digest_of(temporary / name) for name in files},
        )
        (temporary / "checkpoint.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_checkpoint(
    folder: Path,
    *,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    recipe: TrainRecipe,
    network_manifest: NetworkManifest,
) -> CheckpointManifest:
    """Restore network, optimizer and average in place, and return the checkpoint's manifest.

    Raises:
        ConfigError: the checkpoint has another recipe or format.
        IdentityMismatch: it has another student, other data, other targets, or another static adapter.
        CorruptRecord: a file is not the one that was written.
    """
    manifest = read_manifest(folder)
    if manifest.recipe != _digest(recipe):
        raise ConfigError(f"the checkpoint in {folder} is of another recipe; start a new run")
    for name in type(network_manifest).model_fields:
        require_same(
            f"{name} of the checkpoint in {folder}",
            expected=_brief(getattr(manifest, name)),
            found=_brief(getattr(network_manifest, name)),
            remedy="restore what the run was started with, or start a new run",
        )
    _check_files(folder, manifest)
    weights, state_dict = load_file(folder / "network.safetensors"), network.state_dict()
    network.load_state_dict(
        {name: placed_like(tensor, state_dict.get(name, tensor)) for name, tensor in weights.items()}, strict=True
    )
    moments = load_file(folder / "optimizer.safetensors")
    for name, parameter in network.named_parameters():
        state = {
            key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in moments
        }
        if state:
            # AdamW keeps its step count on the CPU and its moments on the parameter's device.
            optimizer.state[parameter] = {k: v if k == "step" else placed_like(v, parameter) for k, v in state.items()}
    if average.tensors:
        averages = load_file(folder / _AVERAGE)
        placed = {name: placed_like(averages[name], tensor) for name, tensor in average.tensors.items()}
        average.restore(placed, manifest.num_averaged)
    return manifest


def read_network(folder: Path) -> tuple[CheckpointManifest, dict[str, Tensor]]:
    """Read a checkpoint's manifest and the network's weights, or their average if they were averaged.

    Raises:
        ConfigError: the checkpoint has another release's format.
        CorruptRecord: a file is missing, or is not the one that was written.
    """
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    try:
        weights = load_file(folder / "network.safetensors")
        return manifest, weights | load_file(folder / _AVERAGE) if _AVERAGE in manifest.files else weights
    except FileNotFoundError as error:  # removed since the check, by a run that saved a newer checkpoint
        raise CorruptRecord(f"{error.filename or folder} was removed while it was read") from error


def _check_files(folder: Path, manifest: CheckpointManifest) -> None:
    for name, digest in manifest.files.items():
        if _digest_of(folder / name) != digest:
            raise CorruptRecord(f"{folder / name} is not the file that was written; {_RESUME_EARLIER}")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # safetensors reports the system's error number, such as that of a full disk, only in the message.
        match = re.search(r"\(os error (\d+)\)", str(error))
        number = int(match[1]) if match else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _digest_of(path: Path) -> str:
    try:
        return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    except OSError as error:
        raise CorruptRecord(f"{path} cannot be read: {error}; {_RESUME_EARLIER}") from error


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read a checkpoint's manifest.

    Raises:
        ConfigError: the checkpoint has another release's format.
        CorruptRecord: the manifest cannot be read.
    """
    path = folder / "checkpoint.json"
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptRecord(f"{path} cannot be read: {error}; {_RESUME_EARLIER}") from error
    if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"the checkpoint in {folder} is of another release's format; start a new run")
    return parse(raw, CheckpointManifest, source=str(path))


def _brief(value: object) -> object:
    """Return a field's value for messages: strings and None as they are, everything else as a digest."""
    if value is None or isinstance(value, str):
        return value
    return blake3(canonical_json(to_jsonable_python(value))).hexdigest()


def _digest(recipe: TrainRecipe) -> str:
    return blake3(canonical_json(recipe.model_dump(mode="json"))).hexdigest()
