"""What `hyperagent export` does: make of a run's checkpoint what the run itself makes at its end.

The run may have stopped, failed, ended or still train. Of the student only the embedding table and the tokenizer are
needed, of the teacher's cache the manifest, of the data nothing.
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
    """Write the bundle, or the PEFT folder of a static run, to `out`; returns what it is of.

    Args:
        which: checkpoint; by default the one that the run's end exports.

    Raises:
        NotFound: there is no run, or it has no such checkpoint.
        Conflict: `out` exists.
        ConfigError: the recipe keeps no best checkpoint, or is not that of the checkpoint; or the student, its tokenizer
            or the teacher's cache is not where the recipe says.
        IdentityMismatch: the student or its tokenizer is another one than the run's.
        CorruptRecord: a file of the checkpoint is not the one that was written, or the run's files are damaged.
        StorageError: the file system refused.
    """
    if not folder.recipe.is_file():
        raise NotFound(f"{folder.root} holds no run; give the folder of one, such as runs/20261123-074501-512034")
    if out.exists():
        raise Conflict(f"{out} is there already; name a folder that is not")
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
    """A checkpoint's manifest and network, also while the run replaces it by newer ones; raises as `export_run` does."""
    if which == "best" and recipe.patience is None:
        raise ConfigError("a run keeps its best checkpoint only with `patience` in its recipe; export the last one")
    is_best = recipe.patience is not None and which != "last"
    while True:
        steps = folder.saved_steps()
        if not steps:
            raise NotFound(
                f"there is no checkpoint in {folder.root}: the run has not saved one yet; ask it to, or wait until it does"
            )
        last = folder.checkpoint(steps[-1])
        try:
            return read_network(folder.checkpoint(read_manifest(last).best.step) if is_best else last)
        except CorruptRecord:
            # The run may have removed it meanwhile, for a newer one.
            if folder.saved_steps() == steps:
                raise


def _require_same_parts(recipe: TrainRecipe, network_manifest: NetworkManifest) -> None:
    """That recipe and student are still those of the checkpoint."""
    if recipe.hypernetwork != network_manifest.hypernetwork or (recipe.arm == "static") != (
        network_manifest.mode == "static"
    ):
        raise ConfigError("the run's checkpoint is of another recipe than its recipe.json; restore the one it had")
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
