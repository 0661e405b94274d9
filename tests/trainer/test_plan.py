"""The plan: the 80B student's memory as FSDP2 counts it, sums that add up, and what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_student import real_config
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hyperagent.cli.main import build_app
from hyperagent.errors import ConfigError
from hyperagent.model.targets import discover_target_layers
from hyperagent_trainer.config import TrainRecipe, load_recipe
from hyperagent_trainer.memory_estimate import bytes_by_dtype
from hyperagent_trainer.plan import make_plan, shard_bytes
from hyperagent_trainer.plan_machines import MACHINES
from hyperagent_trainer.student_shards import shard_student

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def real_model() -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(real_config(), dtype=torch.bfloat16)


def test_a_gpus_share_of_the_80b_student_is_what_fsdp2_counts(real_model: torch.nn.Module) -> None:
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


def plan_of(real_model: torch.nn.Module, machine: str, lengths: list[int], **changes: object) -> object:
    fields = {
        "student": "s",
        "tokens": "t",
        "cache": "c",
        "student_dtype": "bfloat16",
        "num_epochs": 22,
        "processes": MACHINES[machine].gpus_per_node,
        **changes,
    }
    layers = discover_target_layers(real_model)
    return make_plan(
        TrainRecipe.model_validate(fields), real_model, layers, 168_275_968, MACHINES[machine], lengths,
        supervised_share=0.3, mfu=0.3,
    )  # fmt: skip


def test_the_80b_student_trains_on_eight_h200_and_not_on_one(real_model: torch.nn.Module) -> None:
    lengths = [131_072] * 64
    eight = plan_of(real_model, "8xh200", lengths)
    assert eight.fits
    assert 80e9 < eight.memory_total < 110e9
    assert eight.memory_total == sum(item.bytes for item in eight.memory)
    named = {item.name: item for item in eight.memory}
    assert named["inputs kept of all layers"].bytes == 48 * 131_072 * 2048 * 2
    assert named["router picks"].bytes == 131_072 * 10 * 48 * 2
    assert eight.num_steps == 22 * 8
    # By hand: 66 PFLOP for each trajectory at 131,072 tokens counted as frozen operations, 52.7 GFLOP a token less the head.
    assert eight.step_s == pytest.approx(131_072 * 51.8e9 / (0.3 * 989.4e12), rel=0.03)
    assert eight.gather_s == pytest.approx(2 * 158.1e9 * 7 / 8 / 350e9, rel=0.01)
    assert not plan_of(real_model, "1xh200", lengths).fits


def test_without_recomputation_131072_tokens_fit_nowhere(real_model: torch.nn.Module) -> None:
    kept = plan_of(real_model, "64xh200", [131_072] * 64, checkpoint_activations=False)
    assert not kept.fits
    assert kept.memory_total > 500e9


def test_a_recipe_for_another_number_of_gpus_is_refused_and_one_process_takes_one(real_model: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match="starts 4 processes, 8xh200 has 8 GPUs in each node"):
        plan_of(real_model, "8xh200", [1000] * 64, processes=4)
    assert not plan_of(real_model, "8xh200", [1000] * 64, processes=1).fits


def write_recipe(folder: Path, student: Path, tokens: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"student: {student}\ntokens: {tokens}\ncache: cache\nnum_epochs: 3\nbatch_size: 3\nprocesses: 8\n")
    return path


def test_the_command_prints_a_table_and_json(student_folder: Path, tokens_file: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, student_folder, tokens_file)
    shown = CliRunner().invoke(build_app(), ["plan", "--recipe", str(recipe), "--machine", "8xh200"])
    assert shown.exit_code == 0, shown.output
    assert "router picks" in shown.output
    asked = CliRunner().invoke(
        build_app(), ["plan", "--recipe", str(recipe), "--machine", "8xh200", "--price-per-gpu-hour", "3", "--json"]
    )
    found = json.loads(asked.stdout)
    assert found["num_steps"] == 9
    assert found["fits"] is True
    assert found["cost"] == pytest.approx(found["days"] * 24 * 8 * 3, abs=0.1)


@pytest.mark.parametrize(
    ("machine", "student", "reason"),
    [
        ("9xh300", None, "there is no machine '9xh300'; choose from 1xh100"),
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
