"""Test of the whole loop with real processes, in which the teacher is killed halfway."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from world import Run, Start, World

from hyperagent.cache.local import LocalCache
from hyperagent.data.chat.messages import dialogue_of
from hyperagent.data.files.reader import read_rows
from hyperagent.data.files.tokens_file import count_tokens_rows, read_tokens
from hyperagent_demo.peft_check import PeftCheckJob, max_abs_diff


def result(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_trajectories_in_a_prompt_conditioned_lora_out(
    world: World, run: Run, start: Start, free_port: Callable[[], int], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    _populate_with_a_killed_teacher(world, run, start, cache, f"127.0.0.1:{free_port()}")
    run_folder = _train(world, run, start, cache, f"http://127.0.0.1:{free_port()}", tmp_path)
    adapter = _adapter(world, run, start, run_folder, f"http://127.0.0.1:{free_port()}", tmp_path)
    compared = max_abs_diff(
        PeftCheckJob(student=world.student, adapter=adapter, probe=run_folder / "probe.safetensors")
    )
    assert compared["max_abs_diff"] <= 1e-4
    assert compared["adapter_effect"] > 1e-3


def _populate_with_a_killed_teacher(world: World, run: Run, start: Start, cache: Path, address: str) -> None:
    serve = ["serve", "teacher", "--model", world.teacher, "--cache", cache, "--port", address.split(":")[1]]
    serve += ["--top-k", "16", "--max-tokens", "4096"]
    total = count_tokens_rows(world.tokens)

    teacher = start(*serve)
    assert run("wait", "teacher", "--address", address).returncode == 0
    populating = start("cache", "populate", world.tokens, "--teacher", address)
    with LocalCache.open(cache) as opened:
        while len(opened.trajectory_keys()) < 3:
            assert populating.poll() is None
            time.sleep(0.002)
    teacher.send_signal(signal.SIGKILL)
    teacher.wait()
    with LocalCache.open(cache) as opened:
        assert 3 <= len(opened.trajectory_keys()) < total

    teacher = start(*serve)
    assert populating.wait(120) == 0  # It has waited for the teacher.
    with LocalCache.open(cache) as opened:
        assert len(opened.trajectory_keys()) == total
    planned = result(run("cache", "populate", world.tokens, "--teacher", address, "--dry-run", "--json"))
    assert (planned["trajectories"], planned["too_long"]) == (total, [])
    again = result(run("cache", "populate", world.tokens, "--teacher", address, "--json"))
    assert (again["present"], again["written"], again["refused"], again["quarantined"]) == (total, 0, [], [])

    verified = result(run("cache", "verify", cache, "--json"))
    assert (verified["trajectories"], verified["damaged"]) == (total, [])
    assert verified["digest"] == again["digest"]
    assert planned["supervised_tokens"] == again["supervised_tokens"]
    stats = result(run("cache", "stats", cache, "--json"))
    assert (stats["codec"], stats["dead_bytes"]) == ("compact", 0)
    # The plan counts rows; records have headers, and short trajectories have short records.
    assert planned["cache_bytes"]["compact"] < stats["bytes"] < 2 * planned["cache_bytes"]["compact"]
    assert 0 < stats["kl_nats"] < 1e-3
    drift = result(run("cache", "audit", cache, world.tokens, "--teacher", address, "-n", "20", "--json"))
    assert drift["positions"] == 20
    assert drift["top_k_overlap"] > 0.99
    # The cache holds log-probabilities in 256 steps.
    assert 0 < drift["logprob_difference"]["max"] < 0.1
    assert drift["kl_nats"]["mean"] < 1e-3
    opened = LocalCache.open(cache)
    assert opened.trajectory_keys() == sorted(opened.key(t.token_ids, t.positions) for t in read_tokens(world.tokens))
    for trajectory in read_tokens(world.tokens):
        record = opened.get(opened.key(trajectory.token_ids, trajectory.positions))
        assert record.rows.positions.tolist() == trajectory.positions.tolist()
    assert stats["supervised_tokens"] + stats["shared_tokens"] == again["supervised_tokens"]


def _train(world: World, run: Run, start: Start, cache: Path, server: str, tmp_path: Path) -> Path:
    recipe = {
        "student": str(world.student),
        "tokens": str(world.tokens),
        "cache": str(cache),
        "hypernetwork": {
            "width": 32,
            "num_latents": 4,
            "encoder_blocks": 1,
            "generator_blocks": 1,
            "rank": 4,
            "alpha": 8,
        },
        "max_prompt_tokens": 512,
        "num_steps": 50,
        "batch_size": 2,
        "learning_rate": 0.002,
        "warmup_steps": 1,
    }
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    port = server.rsplit(":", 1)[1]
    trainer = start("serve", "trainer", "--recipes", tmp_path / "recipes", "--runs", tmp_path / "runs", "--port", port)
    assert run("wait", "trainer", "--address", server).returncode == 0
    done = result(run("train", "tiny", "--server", server, "--num-steps", "6", "--json"))
    assert (done["state"], done["step"]) == ("done", 6)
    assert set(done["held_out_kl"]) == {"frozen", "adapter", "adapter_shuffled_prompt"}
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(30) == 0
    return tmp_path / "runs" / str(done["id"])


def _adapter(world: World, run: Run, start: Start, run_folder: Path, server: str, tmp_path: Path) -> Path:
    with safe_open(run_folder / "probe.safetensors", framework="np") as probe:
        trajectory_id = probe.metadata()["trajectory_id"]
    prompt = next(dialogue_of(row).task for row in read_rows(world.sample) if row["trajectory_id"] == trajectory_id)
    port = server.rsplit(":", 1)[1]
    service = start(
        "serve", "adapter-api", "--bundle", run_folder / "bundle", "--store", tmp_path / "store", "--port", port,
        "--dtype", "float32",
    )  # fmt: skip
    assert run("wait", "adapter-api", "--address", server).returncode == 0
    made = result(run("adapter", "create", prompt, "--server", server, "--out", tmp_path / "adapter", "--json"))
    assert made["folder"] == str(tmp_path / "adapter")

    too_long = run("adapter", "create", "word " * 600, "--server", server, "--out", tmp_path / "none")
    assert too_long.returncode == 1
    assert "this hypernetwork reads at most 512" in too_long.stderr
    assert not (tmp_path / "none").exists()
    service.send_signal(signal.SIGTERM)
    assert service.wait(30) == 0
    return tmp_path / "adapter"
