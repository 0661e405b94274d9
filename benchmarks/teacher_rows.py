"""Make rows for the cache's benchmark: those of a tiny teacher trained on real trajectories, and synthetic ones."""

from __future__ import annotations

import asyncio
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
from blake3 import blake3

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import HELD_OUT, read_tokens
from hyperagent.data.pipeline.split import SplitSettings
from hyperagent.data.pipeline.tokenize_dataset import TokenizeSettings, tokenize_file
from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.identity import TeacherIdentity
from hyperagent.topk import DEFAULT_TEMPERATURES, TopKRows, concatenate
from hyperagent_demo.config import PretrainConfig
from hyperagent_demo.pretraining.worker import PretrainJob, pretrain
from hyperagent_teacher.engines.transformers import TransformersEngine

VOCABULARY = 151_936
MAX_TOKENS = 3072


def synthetic_rows(num_rows: int, top_k: int) -> tuple[TeacherIdentity, TopKRows]:
    """Return rows whose ids have no pattern, the worst case for a codec."""
    generator = np.random.default_rng(0)
    # Distinct logits, so that ties need not be ordered by id.
    logits = -(1e-3 + generator.exponential(0.15, size=(num_rows, top_k))).cumsum(axis=1)
    logprobs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) - 0.01).astype(np.float32)
    # A random offset for each row of a random subset of a coarser grid, with a random remainder: distinct, and uniform.
    cells = np.argpartition(generator.random((num_rows, 8 * top_k)), top_k, axis=1)[:, :top_k]
    width = VOCABULARY // (8 * top_k)
    ids = cells * width + generator.integers(0, width, size=cells.shape)
    tail = np.log(-np.expm1(np.logaddexp.reduce(logprobs, axis=1, dtype=np.float64))).astype(np.float32)
    rows = TopKRows(
        positions=np.arange(1, num_rows + 1, dtype=np.uint32),
        ids=ids.astype(np.uint32),
        logprobs=logprobs,
        tail_logmass=tail,
        target_logprob=logprobs[:, 0],
        # Assume that the tail is spread evenly over a thousand ids.
        tail_logsumexps=np.stack(
            [tail / t + (1 - 1 / t) * np.log(1000) for t in DEFAULT_TEMPERATURES], axis=1, dtype=np.float32
        ),
    )
    identity = TeacherIdentity(
        "t", "0" * 64, "float32", "x", "0" * 64, "0" * 64, VOCABULARY, top_k, temperatures=DEFAULT_TEMPERATURES
    )
    return identity, rows


def teacher_rows(
    data: Path, tokenizer: Path, *, store: Path, num_rows: int, top_k: int, train_s: float
) -> tuple[TeacherIdentity, TopKRows]:
    """Return a teacher's rows of trajectories it was not trained on, joined as if they were one long sequence.

    Args:
        store: folder that caches tokens files and trained teachers between runs.
        train_s: training time in seconds.
    """
    store.mkdir(parents=True, exist_ok=True)
    settings = TokenizeSettings(
        views=ViewSettings(max_tokens=MAX_TOKENS, max_prompt_tokens=MAX_TOKENS, cut=True),
        split=SplitSettings(held_out_share=0.3),
    )
    config = PretrainConfig(
        hidden_size=128, num_layers=4, num_experts=8, num_steps=100_000, batch_size=1, learning_rate=3e-3, max_seconds=train_s
    )  # fmt: skip
    of_data = blake3(data.read_bytes() + (tokenizer / "tokenizer.json").read_bytes()).hexdigest()[:16]
    tokens, teacher = store / f"tokens-{of_data}.parquet", store / f"teacher-{of_data}-{train_s:g}s"
    if not tokens.is_file():
        tokenize_file(data, tokens, ChatTokenizer(tokenizer), settings)
    if not (teacher / "pretraining.json").is_file():
        job = PretrainJob(
            role="teacher", config=config, tokens=tokens, tokenizer=tokenizer, max_tokens=MAX_TOKENS, seed=0, target=teacher
        )  # fmt: skip
        # It prints progress to standard output, which is reserved for the report.
        with redirect_stdout(sys.stderr):
            pretrain(job)
    engine = TransformersEngine(
        teacher, tokenizer_folder=teacher, top_k=top_k, max_tokens=MAX_TOKENS, temperatures=DEFAULT_TEMPERATURES
    )

    async def collect() -> list[TopKRows]:
        parts: list[TopKRows] = []
        for trajectory in read_tokens(tokens, split=HELD_OUT):
            async for rows in engine.score(trajectory.token_ids, trajectory.positions, top_k=top_k):
                parts.append(rows)
            if sum(part.num_rows for part in parts) >= num_rows:
                break
        return parts

    rows = concatenate(asyncio.run(collect())).part(slice(0, num_rows))
    engine.close()
    return engine.identity, replace(rows, positions=np.arange(1, rows.num_rows + 1, dtype=np.uint32))


def entropy_nats(rows: TopKRows, vocab_size: int) -> np.ndarray:
    """Return each row's entropy [N] in nats with its tail spread evenly over all other ids: an upper bound."""
    logp, tail = rows.logprobs.astype(np.float64), rows.tail_logmass.astype(np.float64)
    spread = np.maximum(tail, -1e3) - np.log(max(vocab_size - rows.top_k, 1))
    return -(np.exp(logp) * np.maximum(logp, -1e3)).sum(axis=1) - np.exp(tail) * spread
