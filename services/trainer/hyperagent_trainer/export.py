"""What a finished run leaves for others: a bundle or a PEFT adapter, and a probe to prove it by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import save

from hyperagent.files import new_directory, write_atomically
from hyperagent.model.bundle import BundleManifest, save_bundle
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.manifest import NetworkManifest
from hyperagent.model.peft_io import CONFIG_FILE, MODEL_FILE, encode_adapter
from hyperagent_trainer.adapted import AdaptedStudent, AdapterNetwork
from hyperagent_trainer.batches import DistillationData
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.model_card import model_card
from hyperagent_trainer.run_folder import RunFolder
from hyperagent_trainer.student import Student

_PROBE_TOKENS = 64


def export(
    folder: RunFolder,
    student: Student,
    network: AdapterNetwork,
    recipe: TrainRecipe,
    *,
    belongs_to: NetworkManifest,
    teacher: str,
    step: int,
    probe: bytes,
    held_out_kl: Mapping[str, float],
) -> None:
    """Write the bundle of a hypernetwork or the PEFT folder of a static adapter, and the probe.

    Args:
        teacher: fingerprint of the teacher.
        probe: what `make_probe` has made.
        held_out_kl: of the evaluation after that step, by arm.

    Raises:
        StorageError: the file system refused.
    """
    if isinstance(network, AgenticHyperNetwork):
        manifest = BundleManifest(
            **dict(belongs_to),
            base_model=str(recipe.student),
            teacher=teacher,
            condition=belongs_to.data.settings["views"]["condition"],
            max_prompt_tokens=recipe.max_prompt_tokens,
            step=step,
        )
        save_bundle(
            folder.bundle,
            manifest,
            hypernetwork=network,
            embeddings=student.embeddings,
            tokenizer_folder=student.folder,
            card=model_card(manifest, recipe, held_out_kl, sum(p.numel() for p in network.parameters())),
        )
    else:
        files = encode_adapter(
            network.adapter(),
            base_model=str(recipe.student),
            alpha=recipe.hypernetwork.alpha,
            origin={"hyperagent_student": student.weights, "hyperagent_data": belongs_to.data.fingerprint},
        )
        with new_directory(folder.adapter) as aside:
            (aside / MODEL_FILE).write_bytes(files.model)
            (aside / CONFIG_FILE).write_bytes(files.config)
    write_atomically(folder.probe, probe)


def make_probe(adapted: AdaptedStudent, held_out: DistillationData) -> bytes:
    """What the adapted student answers on the first held-out prompt, for another process to compare with."""
    trajectory = held_out.trajectories[0]
    token_ids = trajectory.student_ids[-_PROBE_TOKENS:]
    tensors = {
        "prompt_ids": torch.from_numpy(trajectory.prompt_ids.astype("int64")),
        "token_ids": torch.from_numpy(token_ids.astype("int64")),
        "logits": adapted.logits(token_ids, trajectory.prompt_ids).contiguous(),
    }
    return save(tensors, metadata={"trajectory_id": trajectory.trajectory_id})
