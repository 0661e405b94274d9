"""Implement `hyperagent export`: export a run's checkpoint as the run itself does at its end.

The run may have stopped, failed or ended, or may still be training. It needs the student's embedding table and tokenizer
and the manifest of the teacher's cache. The run's tokens file is needed only for the prompt statistics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hyperagent.cache.remote import read_identity
from hyperagent.cli.display import stderr
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import read_data_identity, read_tokens
from hyperagent.errors import ConfigError, Conflict, CorruptRecord, DataError, NotFound
from hyperagent.identity import DataIdentity, require_same, weights_fingerprint
from hyperagent.model.config import EMBEDDINGS
from hyperagent.model.featurizer import EmbeddingFeaturizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.manifest import NetworkManifest
from hyperagent.model.prompt_distance import PromptStatistics
from hyperagent_trainer.checkpoint.format import CheckpointManifest, read_manifest, read_network
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.export.export import export
from hyperagent_trainer.export.statistics import statistics_of
from hyperagent_trainer.network.adapted_student import AdapterNetwork
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
    network = restore_network(network_manifest, weights)
    embeddings = embedding_table(recipe.student, getattr(torch, recipe.student_dtype))
    export(
        out,
        network,
        recipe,
        network_manifest=network_manifest,
        embeddings=embeddings,
        teacher=read_identity(recipe.cache).fingerprint,
        step=manifest.step,
        held_out=held_out,
        statistics=_statistics(network, recipe, embeddings, network_manifest.data),
        verdict=folder.read_verdict(),
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


def _statistics(
    network: AdapterNetwork, recipe: TrainRecipe, embeddings: Tensor, data: DataIdentity
) -> PromptStatistics | None:
    """Compute the prompt statistics if the run's tokens file is there; otherwise say why not on standard error.

    Args:
        embeddings: the student's embedding table [V, E].
        data: identity of the run's data.
    """
    if not isinstance(network, AgenticHyperNetwork):
        return None
    try:
        if network.config.featurizer != EMBEDDINGS:
            raise DataError(f"the hypernetwork reads {network.config.featurizer} of the student, which is not loaded")
        if read_data_identity(recipe.tokens).fingerprint != data.fingerprint:
            raise DataError(f"{recipe.tokens} holds other data than the run's; restore the run's tokens file")
        return statistics_of(network, EmbeddingFeaturizer(embeddings), read_tokens(recipe.tokens), seed=recipe.seed)
    except DataError as error:
        stderr.print(
            f"warning: the bundle will not recognize unusual prompts, because it has no prompt statistics: {error}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return None


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
