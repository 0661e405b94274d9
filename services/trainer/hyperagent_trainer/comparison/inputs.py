"""Load the runs that are compared, and check that they can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hyperagent.cache.remote import open_for_reading
from hyperagent.data.files.tokens_file import TRAIN
from hyperagent.errors import ConfigError, NotFound
from hyperagent.identity import require_same
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.manifest import NetworkManifest
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.data.dataset import DistillationData, load_split
from hyperagent_trainer.export.command import read_chosen
from hyperagent_trainer.network.adapted_student import AdaptedStudent, AdapterNetwork
from hyperagent_trainer.network.build import restore_network
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.student.student import Student


@dataclass(frozen=True, eq=False)
class Run:
    """A trained run: its recipe, and the network that it exports."""

    folder: Path
    recipe: TrainRecipe
    manifest: NetworkManifest
    step: int
    network: AdapterNetwork


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs, each with one or more training seeds, and everything to measure them with."""

    own: list[Run]
    """Hypernetworks trained on their own prompts."""
    static: list[Run]
    """Static adapters; may be empty."""
    trained_on_shuffled: list[Run]
    """Hypernetworks trained on shuffled prompts; may be empty."""
    student: Student
    data: DistillationData
    """Trajectories of the split that is reported, with the teacher's rows."""
    training: DistillationData

    def adapted(self, run: Run) -> AdaptedStudent:
        """Return the student with a run's network in front of it."""
        return AdaptedStudent(self.student, run.network, loss_backend=run.recipe.loss_backend)


@contextmanager
def load_comparison(
    own: Sequence[Path], static: Sequence[Path], trained_on_shuffled: Sequence[Path], *, split: str
) -> Iterator[Comparison]:
    """Load the runs, the student and the data; the cache stays open within the block.

    Raises:
        NotFound: a folder holds no run, or a run has no checkpoint.
        ConfigError: a run is not of the arm that it is given for, or has other targets, rank or alpha.
        IdentityMismatch: a run belongs to another student, other data or another tokenizer.
        DataError: the split is empty.
    """
    arms = {"own": own, "static": static, "trained_on_shuffled": trained_on_shuffled}
    runs = {arm: [load_run(folder, arm) for folder in folders] for arm, folders in arms.items()}
    first = runs["own"][0]
    for run in (run for several in runs.values() for run in several):
        _require_comparable(run, first)
    for run in runs["trained_on_shuffled"]:
        _require_same_steps(run, first)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = first.recipe
    student = Student(recipe.student, device=device, dtype=getattr(torch, recipe.student_dtype))
    require_same(
        f"the student in {recipe.student}",
        expected=first.manifest.student_weights,
        found=student.weights,
        remedy="restore the student that the run was started with",
    )
    for several in runs.values():
        for run in several:
            run.network.to(device)
    with open_for_reading(recipe.cache) as cache:
        data, training = (
            load_split(
                recipe.tokens,
                cache,
                name,
                tokenizer=student.tokenizer.identity,
                max_prompt_tokens=recipe.max_prompt_tokens,
            )
            for name in (split, TRAIN)
        )
        require_same(
            f"the data in {recipe.tokens}",
            expected=first.manifest.data,
            found=data.identity,
            remedy="restore the tokens file that the run was started with",
        )
        yield Comparison(runs["own"], runs["static"], runs["trained_on_shuffled"], student, data, training)


def load_run(root: Path, arm: str) -> Run:
    """Load the network that a run exports.

    Args:
        arm: "own", "static" or "trained_on_shuffled": what the run must be.

    Raises:
        NotFound: the folder holds no run, or the run has no checkpoint.
        ConfigError: the run is of another arm, or has not been trained.
    """
    folder = RunFolder(root)
    if not folder.recipe.is_file():
        raise NotFound(f"{root} holds no run; give the folder of one, such as runs/20261123-074501-512034")
    recipe = folder.read_recipe()
    found = "static" if recipe.arm == "static" else "own" if recipe.prompts == "own" else "trained_on_shuffled"
    if found != arm:
        raise ConfigError(f"the run in {root} belongs to the arm {found!r}, not to {arm!r}; give it for that one")
    manifest, weights = read_chosen(folder, recipe, None)
    network_manifest = NetworkManifest(**{name: getattr(manifest, name) for name in NetworkManifest.model_fields})
    if manifest.step == 0:
        raise ConfigError(f"the run in {root} has not been trained yet: its checkpoint is of step 0; train it first")
    return Run(root, recipe, network_manifest, manifest.step, restore_network(network_manifest, weights))


def _require_comparable(run: Run, first: Run) -> None:
    """Check that two runs differ in nothing but the arm, the seed and the tuning."""
    for name in ("student_weights", "data"):
        require_same(
            f"{name.replace('_', ' ')} of the run in {run.folder}",
            expected=getattr(first.manifest, name),
            found=getattr(run.manifest, name),
            remedy=f"compare runs of one student and one tokens file; {first.folder} has another",
        )
    shapes = [(r.manifest.layers, r.network.scale, _rank(r.network)) for r in (run, first)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"the runs in {run.folder} and {first.folder} have other target layers, rank or alpha, so their adapters are "
            "not of the same size; train both with the same targets, rank and alpha"
        )


def _require_same_steps(run: Run, first: Run) -> None:
    """Check that the control was trained as long as the hypernetwork: otherwise it loses for that alone."""
    if run.step != first.step:
        raise ConfigError(
            f"the run on shuffled prompts in {run.folder} was trained for {run.step} steps, the one in {first.folder} for "
            f"{first.step}; train both equally long"
        )


def _rank(network: AdapterNetwork) -> int:
    return network.config.rank if isinstance(network, AgenticHyperNetwork) else int(network.a[0].shape[0])
