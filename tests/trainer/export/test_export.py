"""Test that `hyperagent export` makes of a run's checkpoint what the run exports at its end."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import StopAfter, last_checkpoint, metrics, run, start_worker
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hyperagent.cli.main import build_app
from hyperagent.data.files.tokens_file import read_data_identity
from hyperagent.errors import (
    ConfigError,
    Conflict,
    CorruptRecord,
    HyperagentError,
    IdentityMismatch,
    NotFound,
    StorageError,
)
from hyperagent.model.bundle import load_bundle
from hyperagent.model.manifest import NetworkManifest
from hyperagent_trainer.checkpoint.best import BestEvaluation
from hyperagent_trainer.checkpoint.manager import CheckpointStore
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.distributed import Ranks
from hyperagent_trainer.evaluation.evaluate import Evaluation, HeldOut
from hyperagent_trainer.export.command import export_run, read_chosen
from hyperagent_trainer.optim.ema import WeightAverage
from hyperagent_trainer.runs.folder import RunFolder


def recorded_run(recipe: TrainRecipe, root: Path, stop: threading.Event | None = None) -> RunFolder:
    """Run a recipe in a folder that contains its recipe.json, as the supervisor writes it."""
    root.mkdir()
    RunFolder(root).recipe.write_text(recipe.model_dump_json())
    return run(recipe, root, stop)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped(recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run stopped after step 5, whose last evaluation was after step 3."""
    recipe = recipe.model_copy(update={"num_steps": 20})
    return recorded_run(recipe, tmp_path_factory.mktemp("stopped") / "run", StopAfter(5))


@pytest.fixture
def folder(stopped: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the stopped run that tests may damage."""
    return RunFolder(shutil.copytree(stopped.root, tmp_path / "run"))


def change_recipe(folder: RunFolder, **changes: Any) -> None:
    folder.recipe.write_text(folder.read_recipe().model_copy(update=changes).model_dump_json())


def test_a_stopped_run_is_exported_as_it_is(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the data there are no prompt statistics; all else needs only the cache's manifest and the student's embeddings.
    recipe = folder.read_recipe()
    (tmp_path / "cache").mkdir()
    shutil.copy(Path(recipe.cache) / "manifest.json", tmp_path / "cache")
    change_recipe(folder, cache=tmp_path / "cache", tokens=tmp_path / "nothing.parquet")

    def no_student(*_: object, **__: object) -> None:
        raise AssertionError("the student was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_student)
    before = contents(folder.root)
    out = tmp_path / "new" / "bundle"
    monkeypatch.setattr("hyperagent.logs.configure_logging", lambda **_: None)  # It would change this process for good.
    shown = CliRunner().invoke(build_app(), ["export", str(folder.root), "--out", str(out), "--json"])
    assert shown.exit_code == 0, shown.output
    kl = next(line["held_out_kl"] for line in metrics(folder) if line["step"] == 3 and "held_out_kl" in line)
    assert json.loads(shown.stdout) == {
        "folder": str(out),
        "step": 5,
        "evaluated_after_step": 3,
        "held_out_kl": kl,
    }
    assert contents(folder.root) == before
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]

    saved, exported = (
        load_file(p) for p in (last_checkpoint(folder) / "network.safetensors", out / "hypernetwork.safetensors")
    )
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)
    bundle = load_bundle(out)
    assert bundle.manifest.step == 5
    assert bundle.statistics is None
    assert any(pair.b.abs().max() > 0 for pair in bundle.generate(np.array([1, 2, 3], np.uint32)).values())
    card = (out / "README.md").read_text()
    assert "5 steps of 3 trajectories" in card
    assert "Measured after step 3." in card
    assert "They are not recognized: this bundle has no prompt statistics" in card
    assert f"| {kl['adapter']:.4f} |" in card


@pytest.mark.parametrize(
    "changes",
    [{}, {"patience": 1, "evaluate_every": 1}, {"arm": "static"}, {"student_dtype": "bfloat16"}, {"num_epochs": 2}],
    ids=str,
)
def test_the_export_of_a_finished_run_is_what_it_has_made_itself(
    recipe: TrainRecipe, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = recorded_run(recipe.model_copy(update=changes), tmp_path / "run")
    own = folder.adapter if changes.get("arm") == "static" else folder.bundle
    export_run(folder, tmp_path / "out", None)
    assert contents(tmp_path / "out") == contents(own)
    assert (own / "prompt_statistics.safetensors").exists() == (own == folder.bundle)


def test_a_network_that_started_from_an_adapter_takes_it_along(recipe: TrainRecipe, tmp_path: Path) -> None:
    static = recorded_run(recipe.model_copy(update={"arm": "static", "learning_rate": 2e-2}), tmp_path / "static")
    warm = recorded_run(recipe.model_copy(update={"warm_start": static.adapter}), tmp_path / "warm")
    shutil.rmtree(static.adapter)
    export_run(warm, tmp_path / "out", "last")
    assert contents(tmp_path / "out") == contents(warm.bundle)


def test_best_and_last_are_chosen_by_name(recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, kls = Evaluation.run, iter([3.0, 2.0, 1.5, 1.8])

    def with_kl(self: Evaluation, *args: Any) -> HeldOut:
        held_out = original(self, *args)
        return replace(held_out, kl={**held_out.kl, "adapter": next(kls)})

    monkeypatch.setattr(Evaluation, "run", with_kl)
    patient = recipe.model_copy(update={"patience": 5, "evaluate_every": 2, "num_steps": 100})
    # Evaluations after steps 0, 2, 4 and 6.
    folder = recorded_run(patient, tmp_path / "run", StopAfter(7))
    assert export_run(folder, tmp_path / "default", None)["step"] == 4
    assert export_run(folder, tmp_path / "best", "best")["evaluated_after_step"] == 4
    last = export_run(folder, tmp_path / "last", "last")
    assert (last["step"], last["evaluated_after_step"], last["held_out_kl"]["adapter"]) == (7, 6, 1.8)
    assert contents(tmp_path / "default") == contents(tmp_path / "best")
    assert load_bundle(tmp_path / "best").fingerprint != load_bundle(tmp_path / "last").fingerprint


@pytest.mark.slow
def test_a_run_is_exported_while_it_trains(recipe: TrainRecipe, tmp_path: Path) -> None:
    long = recipe.model_copy(update={"num_steps": 80, "evaluate_every": 20, "checkpoint_every": 1})
    process, folder = start_worker(long, tmp_path / "run"), RunFolder(tmp_path / "run")
    steps: list[int] = []
    try:
        while process.poll() is None:
            if folder.saved_steps():
                out = tmp_path / f"out-{len(steps)}"
                found = export_run(folder, out, None)
                assert load_bundle(out).manifest.step == found["step"]
                assert found["evaluated_after_step"] == found["step"] // 20 * 20
                steps.append(found["step"])
            time.sleep(0.01)
        assert process.returncode == 0, folder.log.read_text()
    finally:
        process.kill()
    assert steps == sorted(steps)
    assert len(set(steps)) > 1


def test_what_a_living_process_has_not_finished_writing_is_not_read(folder: RunFolder, tmp_path: Path) -> None:
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "held_out_kl": {"adap')
    assert export_run(folder, tmp_path / "out", None)["evaluated_after_step"] == 3


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _other_student(folder: RunFolder) -> None:
    student = shutil.copytree(folder.read_recipe().student, folder.root.parent / "student")
    _flip(next(student.glob("*.safetensors")))
    change_recipe(folder, student=student)


def _other_tokenizer(folder: RunFolder) -> None:
    student = shutil.copytree(folder.read_recipe().student, folder.root.parent / "student")
    with (student / "chat_template.jinja").open("a") as file:
        file.write("{# another one #}")
    change_recipe(folder, student=student)


def _other_network(folder: RunFolder) -> None:
    change_recipe(folder, hypernetwork=folder.read_recipe().hypernetwork.model_copy(update={"alpha": 16.0}))


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda f: (f.root.parent / "out").mkdir(), Conflict, "out already exists; name a folder that does not"),
        (lambda f: f.recipe.unlink(), NotFound, "holds no run"),
        (lambda f: shutil.rmtree(f.checkpoints), NotFound, "no checkpoint in .* the run has not saved one yet"),
        (
            lambda f: (last_checkpoint(f) / "network.safetensors").unlink(),
            CorruptRecord,
            "network.safetensors cannot be read",
        ),
        (lambda f: _flip(last_checkpoint(f) / "network.safetensors"), CorruptRecord, "not the file that was written"),
        (lambda f: _flip(last_checkpoint(f) / "optimizer.safetensors"), CorruptRecord, "not the file that was written"),
        (lambda f: _flip(last_checkpoint(f) / "checkpoint.json"), CorruptRecord, "checkpoint.json cannot be read"),
        (lambda f: f.metrics.unlink(), CorruptRecord, "metrics.jsonl cannot be read"),
        (
            lambda f: f.metrics.write_text('{"step": 1, "loss": 1.0}\n'),
            CorruptRecord,
            "no evaluation at or before step 5",
        ),
        (_other_network, ConfigError, "has another recipe than its recipe.json"),
        (lambda f: change_recipe(f, cache=f.root), ConfigError, "there is no cache in"),
        (_other_student, IdentityMismatch, "the student in .* does not match"),
        (_other_tokenizer, IdentityMismatch, "the tokenizer in .* does not match"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    folder: RunFolder, tmp_path: Path, damage: Callable[[RunFolder], object], error: type[HyperagentError], says: str
) -> None:
    damage(folder)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error, match=says):
        export_run(folder, tmp_path / "out", None)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_best_checkpoint_needs_patience(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only with `patience` in its recipe; export the last one"):
        export_run(folder, tmp_path / "out", "best")


def test_weights_that_do_not_fit_their_manifest_are_refused(folder: RunFolder, tmp_path: Path) -> None:
    manifest = last_checkpoint(folder) / "checkpoint.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**fields, "layers": fields["layers"][1:]}))
    with pytest.raises(CorruptRecord, match="weights do not fit its manifest"):
        export_run(folder, tmp_path / "out", None)


def test_a_full_disk_leaves_nothing_half_written(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == "embeddings.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        export_run(folder, tmp_path / "new" / "out", None)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_checkpoint_is_read_whole_while_it_is_replaced(recipe: TrainRecipe, tmp_path: Path) -> None:
    network = nn.Linear(64, 64)
    network_manifest = NetworkManifest(
        student_weights="0" * 64, data=read_data_identity(recipe.tokens), hypernetwork=recipe.hypernetwork, layers=()
    )
    optimizer = torch.optim.AdamW(network.parameters())
    folder = RunFolder(tmp_path)
    ended = threading.Event()

    def keep_saving() -> None:
        ranks = Ranks(0, 1, torch.device("cpu"), None)
        with CheckpointStore(
            folder,
            network=network,
            optimizer=optimizer,
            average=WeightAverage(network, None),
            recipe=recipe,
            network_manifest=network_manifest,
            ranks=ranks,
        ) as store:
            for step in count(1):
                if ended.is_set():
                    return
                with torch.no_grad():
                    network.weight.fill_(step)
                store.save(step, BestEvaluation())

    writer = threading.Thread(target=keep_saving)
    writer.start()
    try:
        while not folder.saved_steps():
            assert writer.is_alive()
        steps: list[int] = []
        while len(set(steps)) < 100:
            manifest, weights = read_chosen(folder, recipe, "last")
            assert (weights["weight"] == manifest.step).all()
            steps.append(manifest.step)
    finally:
        ended.set()
        writer.join()
    assert steps == sorted(steps)
