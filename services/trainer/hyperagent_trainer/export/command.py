"""Implement `hyperagent export`: export a run's checkpoint as the run itself does at its end.

The run may have stopped, failed or ended, or may still be training. It needs the student's embedding table and tokenizer
and the manifest of the teacher's cache, but no data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hyperagent.cache.remote import read_identity
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError, Conflict, CorruptRecord, NotFound
from hyperagent.identity import require_same, weights_fingerprint
from hyperagent.model.manifest import NetworkManifest
from hyperagent_trainer.checkpoint.format import CheckpointManifest, read_manifest, read_network
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.export.export import export
from hyperagent_trainer.network.build import restore_network
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.metrics_file import last_held_out_kl
from hyperagent_trainer.student.sharding import embedding_table


def export_run(folder: RunFolder, out: Path, which: Literal["last", "best"] | None) -> dict[str, Any]:
    """Write the bundle, or the PEFT folder of a static run, to `out`, and return a summary.

    Args:
        which: checkpoint to export; by default the one that the run exports at its end.

    Returns:
        The folder, the checkpoint's step, and the step and held-out KL of its last evaluation.

    Raises:
        NotFound: there is no run, or it has no such checkpoint.
        Conflict: `out` exists.
        ConfigError: the recipe keeps no best checkpoint, or is not that of the checkpoint; or the student, its tokenizer
            or the teacher's cache is not where the recipe says.
        IdentityMismatch: the student or its tokenizer is not the run's.
        CorruptRecord: a file of the checkpoint is not the one that was written, or the run's files are damaged.
        StorageError: the file system reported an error.
    """
    if not folder.recipe.is_file():
        raise NotFound(f"{folder.root} holds no run; give the folder of one, such as runs/20261123-074501-512034")
    if out.exists():
        raise Conflict(f"{out} already exists; name a folder that does not")
    recipe = folder.read_recipe()
    manifest, weights = read_chosen(folder, recipe, which)
    network_manifest = NetworkManifest(**{name: getattr(manifest, name) for name in NetworkManifest.model_fields})
    _require_same_parts(recipe, network_manifest)
    held_out = last_held_out_kl(folder.metrics, manifest.step)
    export(
        out,
        restore_network(network_manifest, weights),
        recipe,
        network_manifest=network_manifest,
        embeddings=embedding_table(recipe.student, getattr(torch, recipe.student_dtype)),
        teacher=read_identity(recipe.cache).fingerprint,
        step=manifest.step,
        held_out=held_out,
    )
    return {
        "folder": str(out),
        "step": manifest.step,
        "evaluated_after_step": held_out.step,
        "held_out_kl": held_out.kl,
    }


def read_chosen(
    folder: RunFolder, recipe: TrainRecipe, which: Literal["last", "best"] | None
) -> tuple[CheckpointManifest, dict[str, Tensor]]:
    """Read the chosen checkpoint's manifest and weights, also while the run replaces checkpoints by newer ones.

    Raises:
        NotFound, ConfigError, CorruptRecord: see `export_run`.
    """
    if which == "best" and recipe.patience is None:
        raise ConfigError("a run keeps its best checkpoint only with `patience` in its recipe; export the last one")
    is_best = recipe.patience is not None and which != "last"
    while True:
        steps = folder.saved_steps()
        if not steps:
            raise NotFound(
                f"there is no checkpoint in {folder.root}: the run has not saved one yet; request one, or wait until it does"
            )
        last = folder.checkpoint(steps[-1])
        try:
            return read_network(folder.checkpoint(read_manifest(last).best.step) if is_best else last)
        except CorruptRecord:
            # The run may have removed this checkpoint meanwhile, after saving a newer one.
            if folder.saved_steps() == steps:
                raise


def _require_same_parts(recipe: TrainRecipe, network_manifest: NetworkManifest) -> None:
    """Check that the recipe and the student are still those of the checkpoint."""
    if recipe.hypernetwork != network_manifest.hypernetwork or (recipe.arm == "static") != (
        network_manifest.mode == "static"
    ):
        raise ConfigError(
            "the run's checkpoint has another recipe than its recipe.json; restore the original recipe.json"
        )
    remedy = "restore the student that the run was started with"
    require_same(
        f"the student in {recipe.student}",
        expected=network_manifest.student_weights,
        found=weights_fingerprint(recipe.student),
        remedy=remedy,
    )
    require_same(
        f"the tokenizer in {recipe.student}",
        expected=network_manifest.data.tokenizer,
        found=ChatTokenizer(recipe.student).identity,
        remedy=remedy,
    )
