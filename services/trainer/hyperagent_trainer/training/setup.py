"""Setup of a run: load, choose and check everything before the first step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import structlog
import torch

from hyperagent.cache.base import CacheReader
from hyperagent.data.files.disjoint import require_disjoint
from hyperagent.data.files.tokens_file import HELD_OUT, HELD_OUT_TASKS, TRAIN, VALIDATION, has_split
from hyperagent.model.common_tokens import common_ids
from hyperagent.model.manifest import NetworkManifest
from hyperagent.model.peft_io import ImportedAdapter
from hyperagent.storage.files import write_atomically
from hyperagent_trainer.config import AttentionName, TrainRecipe
from hyperagent_trainer.data.dataset import DistillationData, load_split
from hyperagent_trainer.distributed import Ranks
from hyperagent_trainer.network.adapted_student import AdaptedStudent
from hyperagent_trainer.network.build import assemble, describe, read_warm_start
from hyperagent_trainer.optim.optimizer import make_optimizer
from hyperagent_trainer.preflight.memory import memory_budget
from hyperagent_trainer.preflight.prompts import check_prompts
from hyperagent_trainer.preflight.run import run_preflight
from hyperagent_trainer.report import PreflightReport
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.student.attention import Attention, agreed, choose_attention, earlier_choice
from hyperagent_trainer.student.student import Student

log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """Network, data and settings of a run according to its recipe."""

    recipe: TrainRecipe
    """Recipe with epochs converted to steps."""
    adapted: AdaptedStudent
    """Student with the initial network."""
    network_manifest: NetworkManifest
    warm_start: ImportedAdapter | None
    training: DistillationData
    held_out: Mapping[str, DistillationData]
    """Held-out data by split."""
    teacher: str
    """Fingerprint of the teacher."""
    attention: Attention


def load_setup(
    recipe: TrainRecipe, folder: RunFolder, cache: CacheReader, student: Student, ranks: Ranks
) -> TrainingSetup:
    """Load the data and build the network; a collective call under torchrun.

    Raises:
        HyperagentError: the recipe's inputs are missing, damaged, or do not match.
    """
    held_out = _load_splits(recipe, cache, student)
    require_disjoint((t.repo, t.split) for data in held_out.values() for t in data.trajectories)
    training = held_out.pop(TRAIN)
    recipe = recipe.in_steps(len(training.trajectories))
    if recipe.full_view_share > 0:
        training = training.with_full_views()
    warm_start = read_warm_start(recipe)
    # Seeded here because loading the student draws random numbers, whose count depends on the number of ranks.
    torch.manual_seed(recipe.seed)
    common_V = common_ids(
        (trajectory.prompt_ids for trajectory in training.trajectories),
        num_ids=len(student.embeddings),
        max_document_frequency=recipe.hypernetwork.max_document_frequency,
    )
    adapted = assemble(recipe, student, warm_start, common_V=common_V.to(student.embeddings.device))
    return TrainingSetup(
        recipe=recipe,
        adapted=adapted,
        network_manifest=describe(recipe, adapted, warm_start, data=training.identity),
        warm_start=warm_start,
        training=training,
        held_out=held_out,
        teacher=cache.identity.fingerprint,
        attention=_choose_attention(student, recipe, folder, training, ranks),
    )


def require_preflight(setup: TrainingSetup, folder: RunFolder, ranks: Ranks) -> None:
    """Run the pre-flight checks and write the measurements to the run's folder.

    Raises:
        ConfigError: a check failed.
    """
    recipe, adapted = setup.recipe, setup.adapted
    budget = memory_budget(recipe, adapted.student, tokens_per_sample=_longest(setup.training))
    report = run_preflight(adapted, partial(make_optimizer, recipe=recipe), budget, attention=setup.attention.check)
    if (prompts := check_prompts(adapted, setup.training.trajectories)) is not None:
        report = PreflightReport((*report.checks, prompts))
        if prompts.warns:
            log.warning("the prompts hardly differ for the hypernetwork", found=prompts.found, remedy=prompts.remedy)
    if ranks.is_first:
        write_atomically(folder.preflight, json.dumps(report.to_json(), indent=2).encode() + b"\n")
    report.require_passed()


def _load_splits(recipe: TrainRecipe, cache: CacheReader, student: Student) -> dict[str, DistillationData]:
    """Load every split of the tokens file; held-out KL is always measured at temperature 1."""
    return {
        split: load_split(
            recipe.tokens,
            cache,
            split,
            tokenizer=student.tokenizer.identity,
            max_prompt_tokens=recipe.max_prompt_tokens,
            temperature=recipe.temperature if split == TRAIN else 1.0,
        )
        for split in (TRAIN, HELD_OUT, HELD_OUT_TASKS, VALIDATION)
        if split in (TRAIN, HELD_OUT) or has_split(recipe.tokens, split)
    }


def _choose_attention(
    student: Student, recipe: TrainRecipe, folder: RunFolder, data: DistillationData, ranks: Ranks
) -> Attention:
    """Choose the attention kernel: the same on all ranks, and unchanged after a resume."""
    earlier = earlier_choice(folder.preflight)

    def choose(name: AttentionName | None) -> Attention:
        return choose_attention(
            student.model,
            wanted=name or recipe.attention,
            device=student.head.device,
            dtype=student.head.dtype,
            num_tokens=_longest(data),
            earlier=earlier,
        )

    attention = agreed(choose, ranks)
    log.info("attention chosen", **attention.check.measured)
    return attention


def _longest(data: DistillationData) -> int:
    return max(len(t.student_ids) for t in data.trajectories)
