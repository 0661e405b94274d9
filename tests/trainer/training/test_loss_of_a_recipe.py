"""Tests that a training run computes the loss that its recipe specifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loss_oracle import Case, oracle
from tiny_runs import losses, metrics, run

from hyperagent.cache.local import LocalCache
from hyperagent.data.files.tokens_file import TRAIN
from hyperagent.errors import ConfigError
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.data.dataset import Batch, load_split
from hyperagent_trainer.data.schedule import batches_from
from hyperagent_trainer.loss import triton_backend
from hyperagent_trainer.loss.options import LossBackend, LossOptions
from hyperagent_trainer.network.build import assemble
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.student.student import Student


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Student:
    return Student(student_folder, device=torch.device("cpu"))


def first_batch(recipe: TrainRecipe, student: Student) -> Batch:
    with LocalCache.open(Path(recipe.cache)) as cache:
        data = load_split(
            recipe.tokens,
            cache,
            TRAIN,
            tokenizer=student.tokenizer.identity,
            max_prompt_tokens=64,
            temperature=recipe.temperature,
        )
        lengths = [len(t.student_ids) for t in data.trajectories]
        return data[next(batches_from(lengths, batch_size=recipe.batch_size, seed=recipe.seed, first_step=0))]


def defined_loss(recipe: TrainRecipe, student: Student) -> float:
    """Return the loss of the first step by its definition: B starts at zero, so the student has no adapter yet."""
    batch = first_batch(recipe, student)
    assert batch.rows.target_ids_N is not None
    hidden = student.hidden_states(batch.token_ids_BT)[batch.sample_N, batch.index_N]
    rows = batch.rows
    case = Case(hidden, student.head, rows.ids_NK, rows.logprobs_NK, rows.tail_logmass_N, batch.rows.target_ids_N)
    total, _ = oracle(case, student.vocab_size, recipe.loss, temperature=recipe.temperature)
    return float(total) / batch.num_rows


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 2.0},
        {"loss": LossOptions(divergence="jsd", jsd_beta=0.2)},
        {"loss": LossOptions(ce_weight=0.4)},
    ],
    ids=["temperature", "divergence", "cross-entropy"],
)
def test_temperature_and_loss_options_reach_the_loss_of_a_run(
    recipe: TrainRecipe, student: Student, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain = recipe.model_copy(update={"num_steps": 1, "batch_size": 2, "evaluate_every": 1})
    changed = plain.model_copy(update=changes)
    expected = defined_loss(changed, student)
    assert abs(expected / defined_loss(plain, student) - 1) > 0.05
    assert losses(run(changed, tmp_path / "run")) == {1: pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize(("backend", "uses_triton"), [("auto", False), ("torch", False), ("triton", True)])
def test_the_backend_of_a_recipe_computes_the_loss(
    recipe: TrainRecipe,
    student: Student,
    monkeypatch: pytest.MonkeyPatch,
    backend: LossBackend,
    uses_triton: bool,
) -> None:
    original, calls = triton_backend.loss_and_gradient, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(triton_backend, "loss_and_gradient", counted)
    adapted = assemble(recipe.model_copy(update={"loss_backend": backend}), student, None)
    batch = first_batch(recipe, student)
    found = float(adapted.loss_sum(batch, None))
    assert bool(calls) == uses_triton
    assert found == pytest.approx(float(assemble(recipe, student, None).loss_sum(batch, None)), rel=1e-6)


def test_a_backend_that_cannot_run_ends_the_run_before_its_first_step(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"loss_backend cannot be used: .* needs the triton package and a GPU; take"):
        run(recipe.model_copy(update={"loss_backend": "triton"}), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert not folder.metrics.exists() or metrics(folder) == []
