"""Test which prompts a bundle's statistics are computed from, and that runs and exports compute them."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from tiny_runs import run, start_worker

from hyperagent.data.files.tokens_file import (
    HELD_OUT,
    HELD_OUT_TASKS,
    TRAIN,
    TokenizedTrajectory,
    read_data_identity,
    read_tokens,
    write_tokens,
)
from hyperagent.model.bundle import load_bundle
from hyperagent.model.featurizer import EmbeddingFeaturizer, make_featurizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.prompt_distance import PromptStatistics, prompt_statistics
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.export.command import export_run, read_chosen
from hyperagent_trainer.export.statistics import MAX_PROMPTS, spread, statistics_of, statistics_of_run
from hyperagent_trainer.network.build import restore_network
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.student.student import Student

WARNING = "warning: the bundle will not recognize unusual prompts, because it has no prompt statistics: "


def finished_run(recipe: TrainRecipe, root: Path) -> RunFolder:
    """Run a recipe in a folder that contains its recipe.json, as the supervisor writes it."""
    root.mkdir()
    RunFolder(root).recipe.write_text(recipe.model_dump_json())
    return run(recipe, root)


@pytest.fixture(scope="module")
def trained(recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished_run(recipe, tmp_path_factory.mktemp("trained") / "run")


def prompt(repo: int, number: int) -> np.ndarray:
    return np.array([repo, number], np.uint32)


def test_prompts_are_spread_over_repositories_by_a_seed() -> None:
    # Repository r has r + 1 prompts: 465 in all of 30 repositories, and one with 900.
    prompts = {f"r{r}": [prompt(r, n) for n in range(r + 1)] for r in range(30)}
    prompts["large"] = [prompt(99, n) for n in range(900)]
    chosen = spread(prompts, seed=0)
    assert len(chosen) == MAX_PROMPTS == 512
    assert {int(p[0]) for p in chosen[:31]} == {*range(30), 99}
    # All of the small ones, and the large one fills what is left.
    assert Counter(int(p[0]) for p in chosen) == {**{r: r + 1 for r in range(30)}, 99: 512 - 465}
    assert len({tuple(p) for p in chosen}) == 512
    assert [*map(tuple, chosen)] == [*map(tuple, spread(dict(reversed(prompts.items())), seed=0))]
    other = spread(prompts, seed=1)
    assert [*map(tuple, chosen)] != [*map(tuple, other)]
    large = [{int(p[1]) for p in some if p[0] == 99} for some in (chosen, other)]
    assert large[0] != large[1]


def test_more_repositories_than_prompts_give_one_each() -> None:
    chosen = spread({f"r{r}": [prompt(r, n) for n in range(3)] for r in range(600)}, seed=0)
    assert len({int(p[0]) for p in chosen}) == len(chosen) == 512


def test_a_repeated_prompt_counts_once_and_held_out_tasks_count_not_at_all(
    recipe: TrainRecipe, trained: RunFolder
) -> None:
    manifest, weights = read_chosen(trained, recipe, None)
    network = restore_network(manifest, weights)
    assert isinstance(network, AgenticHyperNetwork)
    student = Student(recipe.student, device=torch.device("cpu"))
    featurizer = EmbeddingFeaturizer(student.embeddings)
    trajectories = list(read_tokens(recipe.tokens))
    once = statistics_of(network, featurizer, trajectories, seed=0)
    tasks = [replace(t, split=HELD_OUT_TASKS, prompt_ids=t.prompt_ids[::-1].copy()) for t in trajectories]
    again = statistics_of(network, featurizer, [*trajectories, *trajectories, *tasks], seed=0)
    assert again.encode() == once.encode()
    assert (once.num_training, once.num_held_out) == (8, 3)


def test_a_run_puts_the_statistics_of_its_own_prompts_into_its_bundle(recipe: TrainRecipe, trained: RunFolder) -> None:
    bundle = load_bundle(trained.bundle)
    assert bundle.statistics is not None
    by_split = {split: [t.prompt_ids for t in read_tokens(recipe.tokens, split=split)] for split in (TRAIN, HELD_OUT)}
    expected = prompt_statistics(bundle._hypernetwork, bundle._featurizer, by_split[TRAIN], by_split[HELD_OUT])
    # The prompts come in another order, in which float64 sums differ by rounding, amplified where S hardly varies.
    np.testing.assert_allclose(bundle.statistics.mean_D, expected.mean_D, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bundle.statistics.quantiles_Q, expected.quantiles_Q, rtol=1e-6)
    found = [bundle.novelty(p) for p in by_split[HELD_OUT]]
    assert max(novelty.distance for novelty in found if novelty) == pytest.approx(bundle.statistics.threshold, rel=1e-6)
    card = (trained.bundle / "README.md").read_text()
    assert "its distance from 8 training prompts is above" in card
    assert "of 3 held-out prompts, half are within" in card


def test_a_hypernetwork_that_reads_hidden_states_has_statistics_from_the_run_only(
    recipe: TrainRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = recipe.hypernetwork.model_copy(update={"featurizer": "hidden@1"})
    folder = finished_run(recipe.model_copy(update={"hypernetwork": shape, "num_steps": 2}), tmp_path / "run")
    student = Student(recipe.student, device=torch.device("cpu"))
    bundle = load_bundle(folder.bundle, make_featurizer("hidden@1", student.model))
    assert bundle.statistics is not None
    held_out = [bundle.novelty(t.prompt_ids) for t in read_tokens(recipe.tokens, split=HELD_OUT)]
    assert max(novelty.distance for novelty in held_out if novelty) == pytest.approx(bundle.statistics.threshold)

    capsys.readouterr()
    export_run(folder, tmp_path / "out", None)
    assert not (tmp_path / "out" / "prompt_statistics.safetensors").exists()
    assert capsys.readouterr().err == f"{WARNING}the hypernetwork reads hidden@1 of the student, which is not loaded\n"


@pytest.mark.slow
def test_two_ranks_compute_the_statistics_of_a_sharded_network(recipe: TrainRecipe, tmp_path: Path) -> None:
    # Hardly trained, because AdamW's first steps have the same size for any gradient, even for rounding noise.
    changes = {"num_steps": 1, "learning_rate": 1e-7}
    alone = finished_run(recipe.model_copy(update=changes), tmp_path / "alone")
    both = RunFolder(tmp_path / "both")
    process = start_worker(recipe.model_copy(update={**changes, "processes": 2, "shard_network": True}), both.root)
    try:
        assert process.wait(120) == 0, both.log.read_text()
    finally:
        process.kill()
    found, expected = (
        PromptStatistics.decode(
            (folder.bundle / "prompt_statistics.safetensors").read_bytes(), width=recipe.hypernetwork.width
        )
        for folder in (both, alone)
    )
    np.testing.assert_allclose(found.mean_D, expected.mean_D, atol=1e-4)
    np.testing.assert_allclose(found.quantiles_Q, expected.quantiles_Q, rtol=1e-3)


def test_statistics_are_not_computed_from_other_data(
    trained: RunFolder, recipe: TrainRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = read_data_identity(recipe.tokens)
    other = tmp_path / "other.parquet"
    with write_tokens(other, replace(data, settings={**data.settings, "another": True})) as writer:
        for trajectory in read_tokens(recipe.tokens):
            writer.write(trajectory)
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    for name, reason in (
        ("other.parquet", f"{other} holds other data than the run's; restore the run's tokens file"),
        ("damaged.parquet", "damaged.parquet"),
        ("missing.parquet", "missing.parquet"),
    ):
        folder = RunFolder(shutil.copytree(trained.root, tmp_path / f"run-{name}"))
        folder.recipe.write_text(recipe.model_copy(update={"tokens": tmp_path / name}).model_dump_json())
        capsys.readouterr()
        export_run(folder, tmp_path / f"out-{name}", None)
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(WARNING)
        assert reason in line
        bundle = load_bundle(tmp_path / f"out-{name}")
        assert bundle.statistics is None
        assert bundle.fingerprint == load_bundle(trained.bundle).fingerprint


def test_prompts_that_are_all_the_same_are_logged_and_give_no_statistics(
    recipe: TrainRecipe, trained: RunFolder
) -> None:
    student = Student(recipe.student, device=torch.device("cpu"))
    network = restore_network(*read_chosen(trained, recipe, None))
    same: list[TokenizedTrajectory] = [
        replace(t, prompt_ids=np.array([5, 6, 7], np.uint32)) for t in read_tokens(recipe.tokens)
    ]
    with structlog.testing.capture_logs() as logs:
        assert statistics_of_run(network, student.model, same, seed=0) is None
    [warning] = logs
    assert (warning["event"], warning["log_level"]) == ("the bundle has no prompt statistics", "warning")
    assert warning["reason"].startswith("the 8 training prompts have the same features")
