"""Export a trained network as a bundle or a PEFT adapter, with a probe to verify it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.http.run_models import RunVerdict
from hyperagent.model.bundle import BundleManifest, save_bundle
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.manifest import NetworkManifest
from hyperagent.model.peft_io import encode_adapter
from hyperagent.model.prompt_distance import PromptStatistics
from hyperagent.storage.files import new_directory
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.data.dataset import DistillationData
from hyperagent_trainer.export.model_card import model_card
from hyperagent_trainer.network.adapted_student import AdaptedStudent, AdapterNetwork
from hyperagent_trainer.runs.metrics_file import HeldOutKL

_PROBE_TOKENS = 64


def export(
    out: Path,
    network: AdapterNetwork,
    recipe: TrainRecipe,
    *,
    network_manifest: NetworkManifest,
    embeddings: Tensor,
    teacher: str,
    step: int,
    held_out: HeldOutKL,
    statistics: PromptStatistics | None,
    verdict: RunVerdict | None = None,
) -> None:
    """Write the bundle of a hypernetwork or the PEFT folder of a static adapter, replacing an existing folder.

    Args:
        embeddings: the student's embedding table [V, E].
        teacher: fingerprint of the teacher.
        step: number of optimizer steps that the network was trained for.
        held_out: the last evaluation at or before that step.
        statistics: of the prompts of a hypernetwork; None if they are not known.
        verdict: of the run's last evaluation; None if it was not evaluated.

    Raises:
        ConfigError: the student's folder lacks a tokenizer file.
        StorageError: the file system reported an error.
    """
    if isinstance(network, AgenticHyperNetwork):
        manifest = BundleManifest(
            **dict(network_manifest),
            base_model=str(recipe.student),
            teacher=teacher,
            condition=network_manifest.data.settings["views"]["condition"],
            max_prompt_tokens=recipe.max_prompt_tokens,
            step=step,
        )
        save_bundle(
            out,
            manifest,
            hypernetwork=network,
            embeddings=embeddings,
            tokenizer_folder=recipe.student,
            card=model_card(
                manifest, recipe, held_out, statistics, sum(p.numel() for p in network.parameters()), verdict
            ),
            statistics=statistics,
        )
    else:
        files = encode_adapter(
            network.adapter(),
            base_model=str(recipe.student),
            alpha=recipe.hypernetwork.alpha,
            origin={
                "hyperagent_student": network_manifest.student_weights,
                "hyperagent_data": network_manifest.data.fingerprint,
            },
        )
        with new_directory(out) as temporary:
            (temporary / MODEL_FILE).write_bytes(files.model)
            (temporary / CONFIG_FILE).write_bytes(files.config)


def make_probe(adapted: AdaptedStudent, held_out: DistillationData) -> bytes:
    """Return the adapted student's logits for the first held-out prompt, which another process can compare with its own.

    Returns:
        A safetensors file with `prompt_ids`, `token_ids` and `logits`.
    """
    trajectory = held_out.trajectories[0]
    token_ids = trajectory.student_ids[-_PROBE_TOKENS:]
    tensors = {
        "prompt_ids": torch.from_numpy(trajectory.prompt_ids.astype("int64")),
        "token_ids": torch.from_numpy(token_ids.astype("int64")),
        "logits": adapted.logits(token_ids, trajectory.prompt_ids).contiguous(),
    }
    return save(tensors, metadata={"trajectory_id": trajectory.trajectory_id})
