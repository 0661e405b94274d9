"""Fixtures small enough to train on in seconds: a tiny Qwen3-Next, a dozen trajectories, a filled cache."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from data_identity import data_identity
from tiny_student import write_tiny_student

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.local import LocalCache
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import (
    HELD_OUT,
    TRAIN,
    TokenizedTrajectory,
    read_data_identity,
    read_tokens,
    write_tokens,
)
from hyperagent.data.pipeline.views import Condition, condition_ids
from hyperagent.identity import TeacherIdentity
from hyperagent.model.config import HyperNetworkConfig
from hyperagent.topk import TopKRows
from hyperagent_trainer.config import TrainRecipe

# Triton is built for Linux only; on Linux a missing Triton is an error, not a skip.
collect_ignore = [] if sys.platform == "linux" else ["loss/test_loss_triton.py"]

TOP_K = 8


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student with a byte-level tokenizer; its embedding table has padding rows."""
    return write_tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def tokens_file(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and three held-out trajectories; the task names a letter of the answer."""
    tokenizer = ChatTokenizer(student_folder)
    trajectories = []
    for number in range(11):
        letter = "abcdefghijk"[number]
        prompt = condition_ids(tokenizer, Condition(f"repeat {letter}"), parts=["task"])
        answer = tokenizer.encode(f"yes {letter} " * (4 + number)).ids
        token_ids = np.concatenate([prompt, answer])
        positions = np.arange(len(prompt), len(token_ids), dtype=np.uint32)
        split = HELD_OUT if number >= 8 else TRAIN
        # Every second student does not see the task, so that its positions differ from the teacher's.
        hidden = len(prompt) - 2 if number % 2 else 0
        trajectories.append(
            TokenizedTrajectory(
                f"t{number}",
                f"repo-{number}",
                split,
                token_ids=token_ids,
                positions=positions,
                prompt_ids=prompt,
                student_ids=token_ids[hidden:],
                student_positions=positions - np.uint32(hidden),
            )
        )
    path = tmp_path_factory.mktemp("tokens") / "tokens.parquet"
    with write_tokens(path, data_identity(tokenizer.identity)) as writer:
        for trajectory in trajectories:
            writer.write(trajectory)
    return path


@pytest.fixture(scope="session")
def cache_folder(student_folder: Path, tokens_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose teacher gives the actual token a probability of 0.8 and spreads the rest."""
    tokenizer = ChatTokenizer(student_folder)
    identity = TeacherIdentity(
        model="sure",
        weights="0" * 64,
        dtype="float32",
        backend="by-hand",
        tokenizer_sha256=tokenizer.identity.tokenizer_sha256,
        template_sha256=tokenizer.identity.template_sha256,
        vocab_size=tokenizer.vocab_size,
        top_k=TOP_K,
        temperatures=(2.0,),
    )
    root = tmp_path_factory.mktemp("cache") / "cache"
    cache = LocalCache.create_or_open(root, identity, settings=CacheSettings(codec="exact"))
    cache.record_data(read_data_identity(tokens_file))
    for trajectory in read_tokens(tokens_file):
        n = len(trajectory.positions)
        target = trajectory.token_ids[trajectory.positions]
        others = np.array([[i for i in range(TOP_K) if i != t][: TOP_K - 1] for t in target], dtype=np.uint32)
        probabilities = np.tile([0.8] + [0.1 / (TOP_K - 1)] * (TOP_K - 1), (n, 1))
        rows = TopKRows(
            positions=trajectory.positions,
            ids=np.concatenate([target[:, None], others], axis=1),
            logprobs=np.log(probabilities).astype(np.float32),
            tail_logmass=np.full(n, np.log(0.1), np.float32),
            target_logprob=np.full(n, np.log(0.8), np.float32),
            # The rest is spread evenly over nine ids.
            tail_logsumexps=np.full((n, 1), np.log(9 * (0.1 / 9) ** 0.5), np.float32),
        )
        cache.put(trajectory.token_ids, rows)
    cache.close()
    return root


@pytest.fixture(scope="session")
def recipe(student_folder: Path, tokens_file: Path, cache_folder: Path) -> TrainRecipe:
    return TrainRecipe(
        student=student_folder,
        tokens=tokens_file,
        cache=cache_folder,
        hypernetwork=HyperNetworkConfig(
            width=32, num_latents=4, encoder_blocks=1, generator_blocks=1, num_heads=2, rank=4, alpha=8
        ),
        max_prompt_tokens=64,
        num_steps=6,
        batch_size=3,
        learning_rate=3e-3,
        warmup_steps=1,
        loss_workspace_mib=1,
        evaluate_every=3,
        checkpoint_every=2,
    )
