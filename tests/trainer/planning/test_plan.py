"""Test the plan: the 80B student's memory as FSDP2 counts it, consistent sums, and error messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_student import real_config
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from hyperagent.cli.main import build_app
from hyperagent.errors import ConfigError
from hyperagent_trainer.config import TrainRecipe, load_recipe
from hyperagent_trainer.distributed import machine_bytes
from hyperagent_trainer.planning.command import trainable_network
from hyperagent_trainer.planning.flops import Trajectories
from hyperagent_trainer.planning.machines import machine_named, num_cores
from hyperagent_trainer.planning.memory import shard_bytes
from hyperagent_trainer.planning.plan import Plan, make_plan
from hyperagent_trainer.preflight.memory import bytes_by_dtype
from hyperagent_trainer.student.sharding import shard_student

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.fixture(scope="module")
def real_model() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(real_config(), dtype=torch.bfloat16)


def test_a_gpus_share_of_the_80b_student_is_what_fsdp2_counts(
    real_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Restored at the end: torch replaces the hook when the process group is initialized, and never puts it back.
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    shard = shard_bytes(real_model.get_decoder(), 8, 2)
    whole = 2 * 151_936 * 2048 * 2
    with torch.device("meta"):
        sharded = AutoModelForCausalLM.from_config(real_config(), dtype=torch.bfloat16)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        shard_student(sharded, init_device_mesh("cpu", (8,)))
        assert bytes_by_dtype(sharded) == {"bfloat16": shard + whole}
    finally:
        dist.destroy_process_group()
    assert sum(p.numel() for p in real_model.parameters()) == 79_674_391_296
    assert shard == pytest.approx(19.8e9, rel=0.01)


def plan_of(real_model: PreTrainedModel, machine: str, lengths: list[int], **changes: object) -> Plan:
    chosen = machine_named(machine)
    fields = {
        "student": "s",
        "tokens": "t",
        "cache": "c",
        "student_dtype": "bfloat16",
        "num_epochs": 22,
        "processes": chosen.gpus_per_node,
        **changes,
    }
    recipe = TrainRecipe.model_validate(fields)
    trajectories = Trajectories(lengths, [3 * n // 10 for n in lengths], [2048] * len(lengths))
    return make_plan(recipe, real_model, trainable_network(recipe, real_model), chosen, trajectories, mfu=0.3)


def test_the_80b_student_trains_on_eight_h200_and_not_on_one(real_model: PreTrainedModel) -> None:
    lengths = [131_072] * 64
    eight = plan_of(real_model, "8xh200", lengths)
    assert eight.fits
    assert 80e9 < eight.memory_total < 110e9
    assert eight.memory_total == sum(item.bytes for item in eight.memory)
    named = {item.name: item for item in eight.memory}
    assert named["inputs kept of all layers"].bytes == 48 * 131_072 * 2048 * 2
    assert named["router picks"].bytes == 131_072 * 10 * 48 * 2
    assert eight.num_steps == 22 * 8
    # By hand: 52.7 GFLOP per token at 131,072 by a survey's count, and adapters with 0.5 % of the linear layers' parameters.
    assert eight.compute_s == pytest.approx(131_072 * (52.7e9 + 6 * 15.93e6) / (0.3 * 989.4e12), rel=0.01)
    assert eight.gather_s == pytest.approx(2 * 158.1e9 * 7 / 8 / 351e9, rel=0.01)
    assert eight.step_s == eight.compute_s + eight.reduce_s
    assert not plan_of(real_model, "1xh200", lengths).fits
    averaged = plan_of(real_model, "8xh200", lengths, ema_decay=0.999)
    assert averaged.memory_total - eight.memory_total == 4 * 168_279_040


def test_between_nodes_nothing_is_sent_but_gradients(real_model: PreTrainedModel) -> None:
    lengths = [20_000] * 64
    one = plan_of(real_model, "8xh200", lengths)
    four = plan_of(real_model, "4x8xh200", lengths, batch_size=32)
    # 168M float32 gradients, sent and received: 7/8 of them over NVLink, and 3/4 over eight network adapters of 400 Gb/s.
    within = 2 * 4 * 168_279_040 * 7 / 8 / 351e9
    assert one.reduce_s == pytest.approx(within)
    assert four.reduce_s == pytest.approx(within + 2 * 4 * 168_279_040 * 3 / 4 / 312e9)
    assert four.gather_s == one.gather_s
    assert four.memory == one.memory
    assert four.num_steps * 4 == one.num_steps
    assert four.num_gpus == 32
    assert "a node receives 312 GB/s" in " ".join(four.assumptions)
    assert "a node receives" not in " ".join(one.assumptions)
    # Two micro-batches for each rank; a sharded network sums the gradients after each.
    halves = plan_of(real_model, "8xh200", lengths, batch_size=16)
    sharded = plan_of(real_model, "8xh200", lengths, batch_size=16, shard_network=True)
    assert sharded.reduce_s == pytest.approx(2 * halves.reduce_s)


def test_operations_are_named_and_add_up(real_model: PreTrainedModel) -> None:
    lengths = [16_384] * 16
    plan = plan_of(real_model, "8xh200", lengths)
    assert plan.flops_per_step == sum(plan.operations.values())
    # By hand, for a step of eight: the head twice over 0.3 of the rows, and an adapter's products four times.
    assert plan.operations["output head and loss"] == pytest.approx(8 * 4 * 2048 * 151_936 * 0.3 * 16_384, rel=1e-3)
    assert plan.operations["adapters in the student"] == pytest.approx(8 * 8 * 15.93e6 * 16_384, rel=1e-3)
    assert 0 < plan.operations["hypernetwork"] < 0.01 * plan.flops_per_step
    static = plan_of(real_model, "8xh200", lengths, arm="static")
    assert "hypernetwork" not in static.operations
    assert "network's activations" not in {item.name for item in static.memory}
    early = plan_of(real_model, "8xh200", lengths, hypernetwork={"featurizer": "hidden@12"})
    # A quarter of the layers, forward, over 2,048 tokens of eight prompts: 6.7 GFLOP per token and little attention.
    assert early.operations["prompt's features"] == pytest.approx(8 * 2048 * 6.8e9 / 4, rel=0.05)


def test_without_recomputation_131072_tokens_fit_nowhere(real_model: PreTrainedModel) -> None:
    kept = plan_of(real_model, "8x8xh200", [131_072] * 64, checkpoint_activations=False)
    assert not kept.fits
    assert kept.memory_total > 500e9


def test_a_recipe_for_another_number_of_gpus_is_refused_and_one_process_takes_one(real_model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="starts 4 processes, 8xh200 has 8 GPUs in each node"):
        plan_of(real_model, "8xh200", [1000] * 64, processes=4)
    assert not plan_of(real_model, "8xh200", [1000] * 64, processes=1).fits


def write_recipe(folder: Path, student: Path, tokens: Path, *, processes: int = 8) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"student: {student}\ntokens: {tokens}\ncache: cache\nnum_epochs: 3\nbatch_size: 3\nprocesses: {processes}\n"
    )
    return path


def test_the_command_prints_a_table_and_json(student_folder: Path, tokens_file: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, student_folder, tokens_file)
    shown = CliRunner().invoke(build_app(), ["plan", "--recipe", str(recipe), "--machine", "8xh200"])
    assert shown.exit_code == 0, shown.output
    assert "router picks" in shown.output
    assert "a GPU receives 351 GB/s" in shown.output
    asked = CliRunner().invoke(
        build_app(), ["plan", "--recipe", str(recipe), "--machine", "8xh200", "--price-per-gpu-hour", "3", "--json"]
    )
    found = json.loads(asked.stdout)
    assert found["num_steps"] == 9
    assert found["fits"] is True
    assert found["cost"] == pytest.approx(found["days"] * 24 * 8 * 3, abs=0.1)


def test_a_cpu_is_the_machine_that_the_plan_runs_on(student_folder: Path, tokens_file: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, student_folder, tokens_file, processes=1)
    asked = CliRunner().invoke(
        build_app(), ["plan", "--recipe", str(recipe), "--machine", "1xcpu", "--data", str(tokens_file), "--json"]
    )
    found = json.loads(asked.stdout)
    assert found["memory_available"] == machine_bytes(torch.device("cpu"))
    assert found["gather_s"] == found["reduce_s"] == 0
    assert {"the process itself", "network's activations"} <= {item["name"] for item in found["memory"]}
    operations = sum(found["operations"].values())
    # Recomputation, which does not count as work, is at most a third of them.
    at_rate = operations / (0.23 * num_cores() * 175e9)
    assert 2 / 3 * at_rate <= found["compute_s"] <= at_rate
    assert "Gated DeltaNet's reference implementation" in " ".join(found["assumptions"])


@pytest.mark.parametrize(
    ("machine", "student", "reason"),
    [
        ("9xh300", None, "no machine is called '9xh300'; write GPUSxKIND"),
        ("8xcpu", None, "the kind; or 1xcpu, the machine at hand"),
        ("8xh200", "nothing", "is not a model folder"),
    ],
)
def test_what_is_wrong_is_said(
    machine: str, student: str | None, reason: str, student_folder: Path, tokens_file: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tmp_path / student if student else student_folder, tokens_file)
    shown = CliRunner().invoke(build_app(), ["plan", "--recipe", str(recipe), "--machine", machine])
    assert shown.exit_code != 0
    assert reason in str(shown.exception) + shown.output


@pytest.mark.parametrize(
    "path", sorted([*CONFIGS.glob("recipes/*.yaml"), CONFIGS / "train_config.yaml"]), ids=lambda p: p.stem
)
def test_a_recipe_of_the_project_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.in_steps(32_161).num_steps > recipe.in_steps(32_161).warmup_steps > 0


def test_the_full_run_is_what_the_configuration_says() -> None:
    recipe = load_recipe(CONFIGS / "train_config.yaml").in_steps(32_161)
    assert (recipe.batch_size, recipe.learning_rate, recipe.hypernetwork.rank, recipe.hypernetwork.alpha) == (
        8,
        1e-4,
        16,
        32,
    )
    assert recipe.num_steps == 22 * 4021
    assert recipe.warmup_steps == 2 * 4021
