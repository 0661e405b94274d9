"""Tests of the whole training process with a tiny student."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from blake3 import blake3
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from structlog.testing import capture_logs
from tiny_runs import StopAfter, last_checkpoint, losses, metrics, run, start_worker
from torch import Tensor

from hyperagent.cache.base import CacheReader
from hyperagent.data.files.tokens_file import HELD_OUT_TASKS, read_data_identity, read_tokens, write_tokens
from hyperagent.errors import ConfigError, CorruptRecord, DataError, IdentityMismatch, StorageError
from hyperagent.http.run_models import RunOverrides
from hyperagent.model.bundle import load_bundle
from hyperagent.model.config import HyperNetworkConfig
from hyperagent.model.lora import HookBasedLoRAInjector
from hyperagent_trainer.checkpoint import format as checkpoint_format
from hyperagent_trainer.config import TrainRecipe, load_recipe
from hyperagent_trainer.data import dataset
from hyperagent_trainer.data.row_loader import load_rows
from hyperagent_trainer.data.teacher_rows import TeacherRows
from hyperagent_trainer.evaluation.evaluate import Evaluation, HeldOut
from hyperagent_trainer.network.adapted_student import AdaptedStudent
from hyperagent_trainer.optim.optimizer import learning_rate_factor
from hyperagent_trainer.runs.folder import RunFolder


def test_training_lowers_the_held_out_divergence(recipe: TrainRecipe, tmp_path: Path) -> None:
    folder = run(recipe.model_copy(update={"num_steps": 60, "evaluate_every": 60}), tmp_path / "run")

    status = folder.read_status()
    assert (status.state, status.step) == ("done", 60)
    kl = status.held_out_kl
    assert kl["adapter"] < 0.9 * kl["frozen"]
    before = next(line for line in metrics(folder) if "held_out_kl" in line)
    # B starts at zero: before the first step every arm is the frozen student.
    assert before["step"] == 0
    assert before["held_out_kl"]["adapter"] == pytest.approx(before["held_out_kl"]["frozen"], abs=1e-6)


def test_a_temperature_softens_the_loss_and_not_the_evaluation(recipe: TrainRecipe, tmp_path: Path) -> None:
    plain, soft = (
        run(
            recipe.model_copy(update={"num_steps": steps, "evaluate_every": 60, "temperature": t}),
            tmp_path / f"run-{t}",
        )
        for t, steps in ((1.0, 2), (2.0, 60))
    )
    assert soft.read_status().held_out_kl["frozen"] == plain.read_status().held_out_kl["frozen"]
    assert losses(soft)[1] != pytest.approx(losses(plain)[1], rel=0.05)
    assert soft.read_status().held_out_kl["adapter"] < 0.95 * soft.read_status().held_out_kl["frozen"]


def test_the_bundle_makes_the_adapter_that_training_ended_with(recipe: TrainRecipe, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = run(recipe, tmp_path / "run")

    probe = load_file(folder.probe)
    bundle = load_bundle(folder.bundle)
    weights = bundle.generate(probe["prompt_ids"].numpy().astype("uint32"))
    student = AutoModelForCausalLM.from_pretrained(recipe.student, dtype=torch.float32).eval()
    batched = {name: type(pair)(pair.a[None], pair.b[None]) for name, pair in weights.items()}
    with torch.no_grad(), HookBasedLoRAInjector(student, scale=recipe.hypernetwork.scale).inject(batched):
        logits = student(input_ids=probe["token_ids"][None]).logits[0]
    torch.testing.assert_close(logits, probe["logits"], rtol=0, atol=1e-5)
    with torch.no_grad():
        bare = student(input_ids=probe["token_ids"][None]).logits[0]
    assert float((bare - probe["logits"]).abs().max()) > 1e-3


def test_the_bundle_has_a_model_card(recipe: TrainRecipe, tmp_path: Path) -> None:
    folder = run(recipe, tmp_path / "run")
    card = (folder.bundle / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == recipe.student.name
    kl = metrics(folder)[-1]["held_out_kl"]
    for arm in ("frozen", "adapter", "adapter_shuffled_prompt"):
        assert f"| {kl[arm]:.4f} |" in card
    assert f"`{read_data_identity(recipe.tokens).fingerprint}`" in card
    assert "6 steps of 3 trajectories" in card
    # People may add fields to it.
    (folder.bundle / "README.md").write_text("mine")
    load_bundle(folder.bundle)


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(recipe: TrainRecipe, tmp_path: Path) -> None:
    straight = run(recipe, tmp_path / "straight")
    stopped = run(recipe, tmp_path / "stopped", StopAfter(3))
    assert stopped.read_status().state == "stopped"
    assert stopped.read_status().step == 3
    assert not stopped.bundle.exists()

    # A killed process may leave lines of steps after its checkpoint, the last one incomplete.
    with stopped.metrics.open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    run(recipe, tmp_path / "stopped")

    assert stopped.read_status().state == "done"
    assert losses(stopped) == losses(straight)
    weights = [load_file(f.bundle / "hypernetwork.safetensors") for f in (straight, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_resume_with_another_number_of_threads_is_warned_of(recipe: TrainRecipe, tmp_path: Path) -> None:
    folder = run(recipe, tmp_path / "run", StopAfter(2))
    manifest = last_checkpoint(folder) / "checkpoint.json"
    content = json.loads(manifest.read_text())
    threads = torch.get_num_threads()
    assert content["num_threads"] == threads

    def warnings_of_resume(num_threads: int | None) -> list[tuple[int, int]]:
        manifest.write_text(json.dumps({**content, "num_threads": num_threads}))
        with capture_logs() as logs:
            run(recipe, tmp_path / "run", StopAfter(0))
        return [(line["threads_before"], line["threads_now"]) for line in logs if "threads_now" in line]

    assert warnings_of_resume(threads) == []
    assert warnings_of_resume(threads + 1) == [(threads + 1, threads)]
    # Written by an earlier release.
    assert warnings_of_resume(None) == []


def test_a_checkpoint_of_another_recipe_or_a_damaged_one_is_refused(recipe: TrainRecipe, tmp_path: Path) -> None:
    folder = run(recipe, tmp_path / "run", StopAfter(2))
    with pytest.raises(ConfigError, match="another recipe"):
        run(recipe.model_copy(update={"learning_rate": 1e-3}), tmp_path / "run")
    manifest = last_checkpoint(folder) / "checkpoint.json"
    whole = manifest.read_text()
    for field, changed in (
        ("data", {**json.loads(whole)["data"], "source": "1" * 64}),
        ("student_weights", "0" * 64),
        ("layers", json.loads(whole)["layers"][1:]),
        ("mode", "static"),
    ):
        manifest.write_text(json.dumps({**json.loads(whole), field: changed}))
        with pytest.raises(IdentityMismatch, match=f"{field} of the checkpoint .* restore what the run was started"):
            run(recipe, tmp_path / "run")
    manifest.write_text(whole.replace('"format_version": 3', '"format_version": 2'))
    with pytest.raises(ConfigError, match="another release's format; start a new run"):
        run(recipe, tmp_path / "run")
    manifest.write_text(whole[:40])
    with pytest.raises(CorruptRecord, match=r"checkpoint\.json cannot be read"):
        run(recipe, tmp_path / "run")
    manifest.write_text(whole)
    path = last_checkpoint(folder) / "network.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptRecord, match="not the file that was written"):
        run(recipe, tmp_path / "run")


def test_a_static_adapter_is_trained_by_the_same_code(recipe: TrainRecipe, tmp_path: Path) -> None:
    static = recipe.model_copy(update={"arm": "static", "num_steps": 60, "evaluate_every": 60})
    folder = run(static, tmp_path / "run")
    before, after = (line["held_out_kl"] for line in metrics(folder) if "held_out_kl" in line)
    # It is the same for all prompts, so there is nothing to shuffle.
    assert list(before) == list(after) == ["frozen", "adapter"]
    assert before["adapter"] == pytest.approx(before["frozen"], abs=1e-6)
    assert after["adapter"] < 0.95 * after["frozen"]
    assert not folder.bundle.exists()

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    probe = load_file(folder.probe)
    student = AutoModelForCausalLM.from_pretrained(recipe.student, dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(student, folder.adapter).eval()
    with torch.no_grad():
        logits = adapted(input_ids=probe["token_ids"][None]).logits[0]
    torch.testing.assert_close(logits, probe["logits"], rtol=0, atol=1e-5)


def test_a_stopped_static_run_goes_on_as_if_it_had_not_been_stopped(recipe: TrainRecipe, tmp_path: Path) -> None:
    static = recipe.model_copy(update={"arm": "static"})
    straight, stopped = run(static, tmp_path / "straight"), run(static, tmp_path / "stopped", StopAfter(3))
    assert json.loads((last_checkpoint(stopped) / "checkpoint.json").read_text())["mode"] == "static"
    assert not stopped.adapter.exists()
    run(static, tmp_path / "stopped")
    assert losses(stopped) == losses(straight)
    files = [(f.adapter / "adapter_model.safetensors").read_bytes() for f in (straight, stopped)]
    assert files[0] == files[1]


def test_a_warm_start_begins_where_the_static_adapter_ended(recipe: TrainRecipe, tmp_path: Path) -> None:
    static = run(recipe.model_copy(update={"arm": "static", "learning_rate": 2e-2}), tmp_path / "static")
    warm = recipe.model_copy(update={"warm_start": static.adapter})
    folder = run(warm, tmp_path / "warm")
    first = next(line for line in metrics(folder) if "held_out_kl" in line)["held_out_kl"]
    ended = static.read_status().held_out_kl
    assert ended["adapter"] < 0.99 * ended["frozen"]
    assert first["adapter"] == first["adapter_shuffled_prompt"] == pytest.approx(ended["adapter"], rel=1e-6)
    assert folder.read_status().held_out_kl["adapter"] != first["adapter"]
    # A resumed run has the same initialization.
    run(warm, tmp_path / "stopped", StopAfter(3))
    run(warm, tmp_path / "stopped")
    assert losses(RunFolder(tmp_path / "stopped"))[6] == losses(folder)[6]
    manifest = json.loads((folder.bundle / "bundle.json").read_text())
    assert (manifest["mode"], manifest["warm_start"]) == (
        "warm_start",
        blake3((static.adapter / "adapter_model.safetensors").read_bytes()).hexdigest(),
    )
    other = recipe.hypernetwork.model_copy(update={"alpha": 16.0})
    with pytest.raises(ConfigError, match="rank 4 and alpha 8, the recipe's hypernetwork 4 and 16"):
        run(warm.model_copy(update={"hypernetwork": other}), tmp_path / "other")


def test_a_checkpoint_is_plain_safetensors_with_the_step(recipe: TrainRecipe, tmp_path: Path) -> None:
    folder = run(recipe, tmp_path / "run", StopAfter(2))
    assert json.loads((last_checkpoint(folder) / "checkpoint.json").read_text())["step"] == 2
    moments = load((last_checkpoint(folder) / "optimizer.safetensors").read_bytes())
    assert {name.rsplit(".", 1)[1] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(float(value) == 2 for name, value in moments.items() if name.endswith(".step"))
    assert save(moments)


def test_learning_rate_warms_up_and_decays(recipe: TrainRecipe) -> None:
    schedule = recipe.model_copy(update={"num_steps": 100, "warmup_steps": 10})
    factors = [learning_rate_factor(step, schedule) for step in range(1, 101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[9:]))


def test_sigterm_saves_and_ends_as_stopped(recipe: TrainRecipe, tmp_path: Path) -> None:
    endless = recipe.model_copy(update={"num_steps": 100_000, "evaluate_every": 100_000, "checkpoint_every": 100_000})
    process = start_worker(endless, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    try:
        deadline = time.monotonic() + 120
        while not (folder.metrics.exists() and '"loss"' in folder.metrics.read_text()):
            assert process.poll() is None, folder.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    status = folder.read_status()
    assert status.state == "stopped"
    assert json.loads((last_checkpoint(folder) / "checkpoint.json").read_text())["step"] == status.step > 0


def test_a_worker_that_cannot_start_says_why_in_one_line(recipe: TrainRecipe, tmp_path: Path) -> None:
    process = start_worker(recipe.model_copy(update={"cache": tmp_path / "nothing"}), tmp_path / "run")
    assert process.wait(120) == 1
    status = RunFolder(tmp_path / "run").read_status()
    assert status.state == "failed"
    assert str(tmp_path / "nothing") in status.reason
    assert "\n" not in status.reason


def test_a_diverging_run_stops_and_names_its_trajectories(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The pre-flight check refuses such a learning rate, but it cannot detect later divergence.
    monkeypatch.setattr("hyperagent_trainer.training.trainer.require_preflight", lambda *_: None)
    wild = recipe.model_copy(update={"learning_rate": 1e30, "max_grad_norm": math.inf, "evaluate_every": 100})
    with pytest.raises(DataError, match=r"step \d+ is the 4\. in a row without a finite loss"):
        run(wild, tmp_path / "run")
    skipped = [line for line in metrics(RunFolder(tmp_path / "run")) if "skipped" in line]
    assert len(skipped) == 4
    assert all(name.startswith("t") for line in skipped for name in line["skipped"])


def test_a_step_without_a_finite_gradient_is_skipped_and_changes_nothing(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls, weights = AdaptedStudent.backward, [], []

    def broken_once(self: AdaptedStudent, *args: Any, **kwargs: Any) -> Tensor:
        loss = original(self, *args, **kwargs)
        calls.append(loss)
        weights.append([p.detach().clone() for p in self.network.parameters()])
        if len(calls) == 5:
            next(p for p in self.network.parameters() if p.grad is not None).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(AdaptedStudent, "backward", broken_once)
    folder = run(recipe, tmp_path / "run")
    assert [line["step"] for line in metrics(folder) if "skipped" in line] == [2]
    assert list(losses(folder)) == [1, 3, 4, 5, 6]
    assert folder.read_status().skipped_steps == 1
    # A step follows another five times, four of them with a changed network.
    assert sum(not all(map(torch.equal, before, after)) for before, after in pairwise(weights)) == 4


def test_a_run_whose_held_out_kl_stops_falling_ends_with_the_best_network(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, kls = Evaluation.run, iter([3.0, 2.0, 1.5, 1.8, 1.6, 9.0, 9.0, 9.0])

    def with_kl(self: Evaluation, *args: Any) -> HeldOut:
        held_out = original(self, *args)
        return replace(held_out, kl={**held_out.kl, "adapter": next(kls)})

    monkeypatch.setattr(Evaluation, "run", with_kl)
    patient = recipe.model_copy(update={"num_steps": 20, "evaluate_every": 2, "patience": 2})
    folder = run(patient, tmp_path / "run")
    status = folder.read_status()
    # Evaluations after steps 0, 2, 4, 6 and 8; the best after step 4.
    assert (status.state, status.step) == ("done", 8)
    assert status.reason == "held-out KL was lowest after step 4"
    assert folder.saved_steps() == [4, 6, 8]
    best = load_file(folder.checkpoint(4) / "network.safetensors")
    exported = load_file(folder.bundle / "hypernetwork.safetensors")
    assert best.keys() == exported.keys()
    assert all(torch.equal(best[name], exported[name]) for name in best)
    assert not all(map(torch.equal, best.values(), load_file(last_checkpoint(folder) / "network.safetensors").values()))


def test_a_record_with_nan_ends_the_run_and_names_the_trajectory(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = next(t for t in read_tokens(recipe.tokens) if t.trajectory_id == "t3")

    def with_nan(cache: CacheReader, key: str) -> TeacherRows:
        rows = load_rows(cache, key)
        if key == cache.key(damaged.token_ids, damaged.positions):
            rows.logprobs_NK[1, 2] = math.nan
        return rows

    monkeypatch.setattr(dataset, "load_rows", with_nan)
    with pytest.raises(DataError, match=r"the teacher's rows of t3 cannot be trained on: .*NaN"):
        run(recipe, tmp_path / "run")


def test_a_full_disk_while_saving_ends_the_run_and_the_checkpoint_before_stands(
    recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint_format.save_file
    folder = RunFolder(tmp_path / "run")

    def no_space_later(tensors: dict[str, Tensor], path: Path) -> None:
        if path.name == "optimizer.safetensors" and folder.saved_steps():
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(tensors, path)

    monkeypatch.setattr(checkpoint_format, "save_file", no_space_later)
    with pytest.raises(StorageError, match="the disk is full; free some space"):
        run(recipe, folder.root)
    monkeypatch.undo()
    assert folder.saved_steps() == [2]
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000002"]
    assert losses(run(recipe, folder.root)) == losses(run(recipe, tmp_path / "undisturbed"))


def test_the_last_checkpoints_are_kept_and_one_that_is_damaged_can_be_left_out(
    recipe: TrainRecipe, tmp_path: Path
) -> None:
    recipe = recipe.model_copy(update={"num_steps": 6, "checkpoint_every": 1, "keep_checkpoints": 3})
    folder = run(recipe, tmp_path / "run", StopAfter(5))
    assert folder.saved_steps() == [3, 4, 5]
    path = folder.checkpoint(5) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (folder.checkpoints / ".partial-0-step-00000006").mkdir()
    with pytest.raises(CorruptRecord, match="delete its folder to resume from the previous checkpoint"):
        run(recipe, folder.root)
    shutil.rmtree(folder.checkpoint(5))
    run(recipe, folder.root)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "step-00000004",
        "step-00000005",
        "step-00000006",
    ]
    assert losses(folder) == losses(run(recipe, tmp_path / "undisturbed"))


def test_epochs_are_counted_in_steps_of_the_training_split(recipe: TrainRecipe, tmp_path: Path) -> None:
    fields = recipe.model_dump() | {"num_epochs": 4, "warmup_epochs": 1}
    # Eight trajectories in steps of three.
    in_steps = TrainRecipe.model_validate(fields).in_steps(8)
    assert (in_steps.num_steps, in_steps.warmup_steps) == (12, 3)
    assert len(losses(run(TrainRecipe.model_validate(fields), tmp_path / "run"))) == 12
    for changes, reason in (({"num_epochs": None}, "belongs to num_epochs"), ({"warmup_epochs": 4}, "must be fewer")):
        with pytest.raises(ValidationError, match=reason):
            TrainRecipe.model_validate(fields | changes)


def test_a_recipe_file_resolves_its_paths_and_names_every_bad_field(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("student: models/student\ntokens: /abs/tokens.parquet\ncache: ../cache\n")
    recipe = load_recipe(path, RunOverrides(num_steps=7))
    assert recipe.student == tmp_path / "models" / "student"
    assert recipe.tokens == Path("/abs/tokens.parquet")
    assert recipe.cache == tmp_path.parent / "cache"
    assert recipe.num_steps == 7
    path.write_text("student: a\ntokens: b\ncache: c\nhypernetwork: {preset: tiny, rank: 4}\nwarm_start: ../adapter\n")
    assert load_recipe(path).hypernetwork == HyperNetworkConfig.preset("tiny", rank=4)
    assert load_recipe(path).warm_start == tmp_path.parent / "adapter"
    path.write_text("student: a\ntokens: b\ncache: c\narm: static\nwarm_start: ../adapter\n")
    with pytest.raises(ConfigError, match="warm_start is for a hypernetwork"):
        load_recipe(path)
    path.write_text("student: a\ntokens: b\ncache: c\nlearning_rate: -1\nlearnin_rate: 1\n")
    with pytest.raises(ConfigError, match=r"learning_rate: .*; learnin_rate: "):
        load_recipe(path)


def test_tasks_that_are_held_out_are_evaluated_by_themselves(recipe: TrainRecipe, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.parquet"
    with write_tokens(tokens, read_data_identity(recipe.tokens)) as writer:
        for one in read_tokens(recipe.tokens):
            writer.write(replace(one, split=HELD_OUT_TASKS) if one.trajectory_id == "t3" else one)
    folder = run(recipe.model_copy(update={"tokens": tokens, "num_steps": 1}), tmp_path / "run")
    kl = folder.read_status().held_out_kl
    arms = ["frozen", "adapter", "adapter_shuffled_prompt"]
    assert list(kl) == [*arms, *(f"{arm}_tasks" for arm in arms)]
    assert all(value > 0 for value in kl.values())
    assert kl["frozen_tasks"] != kl["frozen"]
