"""Repositories of a validation split choose the checkpoint; a repository in two splits is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run

from hyperagent.data.files.tokens_file import (
    HELD_OUT,
    TRAIN,
    VALIDATION,
    TokenizedTrajectory,
    read_data_identity,
    read_tokens,
    write_tokens,
)
from hyperagent.errors import DataError
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.evaluation.evaluate import Evaluation, HeldOut


def with_splits(recipe: TrainRecipe, path: Path, changed: dict[str, dict[str, Any]]) -> TrainRecipe:
    """Return the recipe with a tokens file in which some trajectories have other fields."""

    def trajectories() -> Iterator[TokenizedTrajectory]:
        for trajectory in read_tokens(recipe.tokens):
            yield replace(trajectory, **changed.get(trajectory.trajectory_id, {}))

    with write_tokens(path, read_data_identity(recipe.tokens)) as writer:
        for trajectory in trajectories():
            writer.write(trajectory)
    return recipe.model_copy(update={"tokens": path})


def test_the_checkpoint_is_chosen_on_the_validation_repositories(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Evaluation.run
    # The reported repositories would choose the last checkpoint, the validation repositories the one after step 2.
    reported, validation = iter((0.9, 0.8, 0.7, 0.6)), iter((0.9, 0.5, 0.7, 0.8))

    def with_kl(self: Evaluation, *args: Any) -> HeldOut:
        found = original(self, *args)
        assert {"adapter", "adapter_validation", "frozen_validation"} <= set(found.kl)
        return replace(found, kl={**found.kl, "adapter": next(reported), "adapter_validation": next(validation)})

    monkeypatch.setattr(Evaluation, "run", with_kl)
    split = with_splits(recipe, tmp_path / "tokens.parquet", {name: {"split": VALIDATION} for name in ("t6", "t7")})
    folder = run(split.model_copy(update={"num_steps": 20, "evaluate_every": 2, "patience": 2}), tmp_path / "run")
    status = folder.read_status()
    assert (status.state, status.reason) == ("done", "held-out KL was lowest after step 2")
    assert set(status.conditioning) == {HELD_OUT, VALIDATION}


def test_a_repository_in_two_splits_is_refused(recipe: TrainRecipe, tmp_path: Path) -> None:
    leaked = next(t for t in read_tokens(recipe.tokens, split=TRAIN))
    held_out = next(t for t in read_tokens(recipe.tokens, split=HELD_OUT))
    changed = with_splits(recipe, tmp_path / "tokens.parquet", {held_out.trajectory_id: {"repo": leaked.repo}})
    with pytest.raises(DataError, match=f"the repository {leaked.repo} is in the splits held_out and train"):
        run(changed, tmp_path / "run")


def test_without_a_validation_split_the_reported_repositories_choose() -> None:
    assert HeldOut({"adapter": 0.5}, {}).selecting_kl == 0.5
    assert HeldOut({"adapter": 0.5, "adapter_validation": 0.4}, {}).selecting_kl == 0.4
