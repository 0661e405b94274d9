"""Fixtures for real processes on small inputs: generated trajectories, a trained tokenizer, random tiny models."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from world import Run, Start, World

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.pipeline.tokenize_dataset import TokenizeSettings, tokenize_file
from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.model.bundle import copy_tokenizer
from hyperagent.progress import no_progress
from hyperagent_demo.config import PretrainConfig, Role
from hyperagent_demo.pretraining.models import build_model
from hyperagent_demo.sample.generate import write_sample
from hyperagent_demo.tokenizer import tokenizer_texts, train_tokenizer

HYPERAGENT = [sys.executable, "-m", "hyperagent"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    sample, tokenizer, tokens = root / "sample.parquet", root / "tokenizer", root / "tokens.parquet"
    write_sample(sample, seed=0, rows=24, progress=no_progress)
    train_tokenizer(tokenizer_texts(sample), tokenizer, vocab_size=768)
    chat = ChatTokenizer(tokenizer)
    views = ViewSettings(condition=("task",), internalized=("task",), max_tokens=4096, max_prompt_tokens=512)
    tokenize_file(sample, tokens, chat, TokenizeSettings(views=views))
    config = PretrainConfig(
        hidden_size=32, num_layers=4, num_experts=4, num_steps=1, batch_size=1, learning_rate=1e-3, max_seconds=1
    )
    folders: dict[Role, Path] = {"teacher": root / "teacher", "student": root / "student"}
    for role, folder in folders.items():
        torch.manual_seed(0)
        build_model(role, config, vocab_size=chat.vocab_size + 7, max_tokens=4096).save_pretrained(folder)
        copy_tokenizer(tokenizer, folder)
    return World(root, sample, tokenizer, tokens, folders["teacher"], folders["student"])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an isolated environment: its own token file, no Redis, one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HYPERAGENT_")}
    return {**kept, "HYPERAGENT_TOKEN_FILE": str(tmp_path / "token"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    """Return a function that runs one `hyperagent` command to completion."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*HYPERAGENT, *map(str, arguments)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    return run


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a `hyperagent` command, which is killed when the test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
        log = tmp_path / f"log-{len(started)}.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*HYPERAGENT, *map(str, arguments)], env=environment, cwd=tmp_path, stdout=output, stderr=output
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def free_port() -> Callable[[], int]:
    def free_port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return free_port
