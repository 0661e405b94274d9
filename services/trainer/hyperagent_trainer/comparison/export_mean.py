"""Export the mean adapter of a hypernetwork: one static adapter, for when the prompt turns out not to matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.data.files.tokens_file import TRAIN, read_data_identity, read_tokens
from hyperagent.errors import Conflict, DataError
from hyperagent.identity import require_same
from hyperagent.model.peft_io import encode_adapter
from hyperagent.storage.files import new_directory
from hyperagent_trainer.comparison.inputs import load_run
from hyperagent_trainer.comparison.mean_adapter import NUM_MEAN_PROMPTS, mean_of_prompts
from hyperagent_trainer.evaluation.arms import OWN
from hyperagent_trainer.network.adapted_student import AdaptedStudent
from hyperagent_trainer.student.student import Student


def export_mean(root: Path, out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Write the mean adapter of up to 64 training prompts as a PEFT folder, and return a summary.

    Args:
        root: folder of a hypernetwork's run.
        seed: seed of the choice of prompts.

    Raises:
        NotFound: there is no run, or it has no checkpoint.
        Conflict: `out` exists.
        ConfigError: the run is not a hypernetwork's.
        IdentityMismatch: the tokens file or the student is not the run's.
        DataError: the tokens file has no training trajectory.
        StorageError: the file system reported an error.
    """
    if out.exists():
        raise Conflict(f"{out} already exists; name a folder that does not")
    run = load_run(root, OWN)
    recipe, manifest = run.recipe, run.manifest
    require_same(
        f"the data in {recipe.tokens}",
        expected=manifest.data,
        found=read_data_identity(recipe.tokens),
        remedy="restore the tokens file that the run was started with",
    )
    student = Student(recipe.student, device=torch.device("cpu"), dtype=getattr(torch, recipe.student_dtype))
    require_same(
        f"the student in {recipe.student}",
        expected=manifest.student_weights,
        found=student.weights,
        remedy="restore the student that the run was started with",
    )
    trajectories = list(read_tokens(recipe.tokens, split=TRAIN))
    if not trajectories:
        raise DataError(f"{recipe.tokens} has no training trajectory, so there are no prompts to average over")
    adapter = mean_of_prompts(AdaptedStudent(student, run.network), trajectories, seed=seed)
    files = encode_adapter(
        adapter,
        base_model=str(recipe.student),
        alpha=recipe.hypernetwork.alpha,
        origin={"hyperagent_student": manifest.student_weights, "hyperagent_data": manifest.data.fingerprint},
    )
    with new_directory(out) as temporary:
        (temporary / MODEL_FILE).write_bytes(files.model)
        (temporary / CONFIG_FILE).write_bytes(files.config)
    return {"folder": str(out), "step": run.step, "prompts": min(NUM_MEAN_PROMPTS, len(trajectories))}
