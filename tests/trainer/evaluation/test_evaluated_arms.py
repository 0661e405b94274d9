"""Test the arms of a real run's evaluation against the exported adapters merged into the student by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from plain_step import PlainStudent
from tiny_runs import metrics, run

from hyperagent.data.files.tokens_file import (
    HELD_OUT,
    read_data_identity,
    read_tokens,
    write_tokens,
)
from hyperagent.model.bundle import load_bundle
from hyperagent_trainer.config import TrainRecipe

HELD_OUT_REPOS = {"t7": "x", "t8": "x", "t9": "y", "t10": "y"}


@pytest.fixture(scope="module")
def two_repositories(recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> TrainRecipe:
    """Two repositories are held out, each with several trajectories and prompts; the adapters learn fast."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.parquet"
    with write_tokens(tokens, read_data_identity(recipe.tokens)) as writer:
        for number, one in enumerate(read_tokens(recipe.tokens)):
            repo = HELD_OUT_REPOS.get(one.trajectory_id)
            changed = replace(one, split=HELD_OUT, repo=repo) if repo else one
            writer.write(replace(changed, prompt_ids=one.token_ids[number : number + 8]))
    # With this seed a draw that ignored the repositories would take three prompts of the trajectory's own.
    fast = {
        "tokens": tokens,
        "seed": 11,
        "learning_rate": 1e-2,
        "num_steps": 8,
        "warmup_steps": 4,
        "evaluate_every": 100,
    }
    return recipe.model_copy(update=fast)


def test_every_arm_is_what_its_prompts_adapters_give(two_repositories: TrainRecipe, tmp_path: Path) -> None:
    folder = run(two_repositories, tmp_path / "run")
    found = metrics(folder)[-1]["held_out_kl"]

    student, bundle = PlainStudent(two_repositories), load_bundle(folder.bundle)
    held_out = list(read_tokens(two_repositories.tokens, split=HELD_OUT))
    adapters = [bundle.generate(one.prompt_ids) for one in held_out]
    rows = sum(len(one.positions) for one in held_out)
    frozen = sum(float(student.row_losses(one, None).sum()) for one in held_out) / rows
    kl = np.array([[float(student.row_losses(one, a).sum()) for a in adapters] for one in held_out]) / rows
    assert found["frozen"] == pytest.approx(frozen, rel=1e-5)
    assert found["adapter"] == pytest.approx(np.trace(kl), rel=1e-5)

    def nearest(choices: list[list[int]]) -> float:
        """Return the distance of the shuffled arm from the best choice of a prompt for each trajectory."""
        sums = np.array([kl[np.arange(len(held_out)), choice].sum() for choice in product(*choices)])
        return float(np.abs(sums / found["adapter_shuffled_prompt"] - 1).min())

    repos = [one.repo for one in held_out]
    foreign = [[j for j, other in enumerate(repos) if other != repo] for repo in repos]
    assert nearest(foreign) < 1e-5
    # Neither a trajectory's own prompt nor another one of its repository gives this KL.
    for i, repo in enumerate(repos):
        same = [j for j, other in enumerate(repos) if other == repo]
        assert nearest([same if i == place else choice for place, choice in enumerate(foreign)]) > 1e-4
