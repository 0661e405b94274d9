"""Tests of user errors: one clear line on standard error, exit code 1, and no partial output."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from world import Run, Start, World, one_line

from hyperagent_demo.tokenizer import train_tokenizer


def test_a_parquet_without_the_columns(world: World, run: Run, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "trajectory_id": ["1"]}), tmp_path / "other.parquet")
    line = one_line(run("data", "tokenize", tmp_path / "other.parquet", "out.parquet", "--tokenizer", world.tokenizer))
    assert "has no column with messages" in line
    assert not (tmp_path / "out.parquet").exists()


def test_a_tokenizer_that_is_not_the_teachers(
    world: World, run: Run, start: Start, free_port: Callable[[], int], tmp_path: Path
) -> None:
    train_tokenizer(["another text altogether " * 50], tmp_path / "tokenizer", vocab_size=512)
    tokens = tmp_path / "tokens.parquet"
    assert run("data", "tokenize", world.sample, tokens, "--tokenizer", tmp_path / "tokenizer").returncode == 0
    port = free_port()
    start("serve", "teacher", "--model", world.teacher, "--cache", tmp_path / "cache", "--port", port)
    assert run("wait", "teacher", "--address", f"127.0.0.1:{port}").returncode == 0
    line = one_line(run("cache", "populate", tokens, "--teacher", f"127.0.0.1:{port}"))
    assert "tokenizer" in line
    assert "does not match" in line
    assert not list((tmp_path / "cache").glob("shards/*"))


@pytest.mark.parametrize("service", ["teacher", "trainer", "adapter-api"])
def test_a_busy_port(service: str, world: World, run: Run, tmp_path: Path) -> None:
    arguments = {
        "teacher": ["--model", world.teacher, "--cache", tmp_path / "cache"],
        "trainer": ["--recipes", tmp_path, "--runs", tmp_path / "runs"],
        "adapter-api": ["--bundle", tmp_path / "bundle"],
    }
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = one_line(run("serve", service, *arguments[service], "--port", taken.getsockname()[1]))
    assert "port is taken" in line or "in use" in line
    assert not (tmp_path / "runs").exists()


def test_nobody_answers(world: World, run: Run, free_port: Callable[[], int], tmp_path: Path) -> None:
    assert "there is no access token" in one_line(run("cache", "populate", world.tokens))
    (tmp_path / "token").write_text("t\n")
    line = one_line(run("cache", "populate", world.tokens, "--teacher", f"127.0.0.1:{free_port()}"))
    assert "hyperagent serve teacher" in line


def test_a_full_disk(world: World, environment: dict[str, str], tmp_path: Path) -> None:
    """A file size limit of 4 KiB simulates a full disk: the write fails halfway just the same."""
    (tmp_path / "token").write_text("t\n")
    command = [sys.executable, "-m", "hyperagent", "data", "tokenize", str(world.sample), "tokens.parquet"]
    command += ["--tokenizer", str(world.tokenizer)]
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 4; exec {shlex.join(command)}"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "could not write tokens.parquet" in one_line(done)
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


def test_an_unknown_cache_and_an_unknown_recipe_field(run: Run, tmp_path: Path) -> None:
    assert "there is no cache in nowhere" in one_line(run("cache", "verify", "nowhere"))
    (tmp_path / "demo.yaml").write_text("sede: 1\n")
    line = one_line(run("demo", "--config", tmp_path / "demo.yaml"))
    assert "sede: Extra inputs are not permitted" in line


def test_the_demo_leaves_a_folder_of_somebody_elses_alone(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    config = Path(__file__).parents[2] / "configs" / "demo_smoke.yaml"
    line = one_line(run("demo", "--config", config, "--out", out))
    assert "choose another --out" in line
    assert (out / "chapter.txt").read_text() == "years of work"
