"""Test docs/plan.md: its commands run as written, and its figures are those that the plan computes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_identity import data_identity
from doc_blocks import bash_blocks
from tiny_student import real_config, write_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import TRAIN, TokenizedTrajectory, write_tokens
from hyperagent_trainer.config import load_recipe
from hyperagent_trainer.planning.command import trainable_network
from hyperagent_trainer.planning.flops import Trajectories
from hyperagent_trainer.planning.machines import machine_named
from hyperagent_trainer.planning.plan import Plan, make_plan

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "plan.md"
LONGEST = 131_072
NUM_TRAJECTORIES = 32_161


def write_random_tokens(path: Path, tokenizer: ChatTokenizer, lengths: list[int]) -> None:
    path.parent.mkdir(parents=True)
    with write_tokens(path, data_identity(tokenizer.identity)) as writer:
        for number, length in enumerate(lengths):
            ids = np.full(length, 65, np.uint32)
            positions = np.arange(length // 2, length, dtype=np.uint32)
            writer.write(
                TokenizedTrajectory(
                    f"t{number}",
                    f"repo-{number}",
                    TRAIN,
                    token_ids=ids,
                    positions=positions,
                    prompt_ids=ids[: length // 4],
                    student_ids=ids,
                    student_positions=positions,
                )
            )


@pytest.mark.slow
def test_its_commands_run(student_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = ChatTokenizer(tmp_path / "tokenizer")
    # The files that the page assumes the reader to have.
    real_config().save_pretrained(tmp_path / "models" / "Qwen3-Coder-Next")
    write_random_tokens(tmp_path / "data" / "tokens.parquet", tokenizer, [900 + n for n in range(128)])
    shutil.copytree(student_folder, tmp_path / "runs" / "demo" / "student")
    write_random_tokens(tmp_path / "runs" / "steps" / "tokens.parquet", tokenizer, [100 + n for n in range(8)])
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, arguments in {"hyperagent": "-m hyperagent", "python": ""}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (commands / name).chmod(0o755)
    blocks = bash_blocks(PAGE)
    assert len(blocks) == 4
    path = os.pathsep.join(entry for entry in sys.path if entry)
    ended = subprocess.run(
        ["bash", "-c", "\n".join(["set -euxo pipefail", *blocks])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert len(re.findall(r"^total +\S+ +of \d+", ended.stdout, re.M)) == 3
    assert float(ended.stdout.splitlines()[-1]) > 1


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(real_config(), dtype=torch.bfloat16)


def plan_of(model: PreTrainedModel, lengths: list[int], *, mfu: float = 0.23, **changes: object) -> Plan:
    recipe = load_recipe(ROOT / "configs" / "train_config.yaml").model_copy(update=changes)
    trajectories = Trajectories(lengths, [3 * n // 10 for n in lengths], [2048] * len(lengths))
    return make_plan(recipe, model, trainable_network(recipe, model), machine_named("8xh200"), trajectories, mfu=mfu)


def test_its_memory_is_the_plans(model: PreTrainedModel) -> None:
    page, plan = PAGE.read_text(encoding="utf-8"), plan_of(model, [LONGEST] * 8)
    for item in plan.memory:
        assert f"\n| {item.name} | {item.bytes / 1e9:.2f} |" in page
    assert f"\n| **total** of 141 | **{plan.memory_total / 1e9:.2f}** |" in page
    held = {item.name: item.bytes / 1e9 for item in plan.memory}
    student = held["student's layers, this GPU's shard"] + held["embedding table and head, whole"]
    assert f"8 ranks: {student:.2f} GB with the next line" in page
    of_layers = ("inputs kept of all layers", "one layer run again and backward", "router picks")
    kept = [held[name] for name in of_layers]
    assert f"{' + '.join(f'{gb:.1f}' for gb in kept)} GB on each GPU, {8 * sum(kept):.0f} on eight" in page
    without = {
        item.name: item.bytes / 1e9 for item in plan_of(model, [LONGEST] * 8, checkpoint_activations=False).memory
    }
    assert f"{without['activations']:,.0f} GB on each GPU, which fits nowhere" in page
    # The page's statements about 80 GB.
    available = machine_named("8xh100").memory_bytes
    saved = plan_of(model, [LONGEST] * 8, moe_tile_tokens=4096, shard_network=True).memory_total
    assert f"save {(plan.memory_total - saved) / 1e9:.0f} GB" in page
    assert plan_of(model, [80_000] * 8).memory_total < available < plan_of(model, [96_000] * 8).memory_total


@pytest.mark.parametrize(("name", "mean"), [("lognormal, mean 43,602", 45_000), ("all 131,072", LONGEST)])
def test_its_days_are_the_plans(name: str, mean: int, model: PreTrainedModel) -> None:
    spread = np.sqrt(np.log(1 + 0.8**2))
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - spread**2 / 2, spread, NUM_TRAJECTORIES)
    lengths = [LONGEST] * NUM_TRAJECTORIES if mean == LONGEST else drawn.clip(1_000, LONGEST).astype(int).tolist()
    plans = [plan_of(model, lengths, mfu=mfu) for mfu in (0.3, 0.23, 0.15)]
    days = " | ".join(f"{plan.days:.1f}" for plan in plans)
    assert f"\n| {name} | {plans[1].step_s:.1f} | {days} |" in PAGE.read_text(encoding="utf-8")
