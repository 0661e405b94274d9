"""Teacher's rows, student's outputs and supervised tokens stand where they should, by one place exactly."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from world import World

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.local import LocalCache
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import HELD_OUT, read_data_identity, read_tokens
from hyperagent.data.pipeline.tokenize_dataset import TokenizeSettings, tokenize_file
from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.topk import TopKRows, concatenate
from hyperagent_teacher.engines.transformers import TransformersEngine
from hyperagent_teacher.service.memory_budget import MemoryBudget
from hyperagent_teacher.service.populate import Populator, Trajectory
from hyperagent_trainer.data.dataset import Batch, DistillationData, load_split
from hyperagent_trainer.loss.distillation import compute_distillation_loss
from hyperagent_trainer.student.student import Student


@pytest.fixture(scope="module")
def student(world: World) -> Student:
    return Student(world.student, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def engine(world: World) -> TransformersEngine:
    """The student itself as the teacher."""
    return TransformersEngine(world.student, tokenizer_folder=world.student, top_k=64, max_tokens=4096)


def populated(engine: TransformersEngine, student: Student, tokens: Path, root: Path) -> DistillationData:
    """The held-out trajectories of a tokens file, with their rows in a cache of the engine's."""
    cache = LocalCache.create_or_open(root, engine.identity, settings=CacheSettings(codec="exact"))

    async def populate() -> None:
        populator = Populator(engine, cache, MemoryBudget(1 << 30), data_dir=None)
        await populator.begin(read_data_identity(tokens))
        for one in read_tokens(tokens):
            await populator.populate(Trajectory(one.trajectory_id, one.token_ids, one.positions))

    asyncio.run(populate())
    return load_split(tokens, cache, HELD_OUT, tokenizer=student.tokenizer.identity, max_prompt_tokens=512)


def kl(student: Student, batch: Batch) -> float:
    """Nats per supervised token."""
    with torch.no_grad():
        hidden = student.hidden_states(batch.token_ids_BT)
        total = compute_distillation_loss(
            hidden[batch.sample_N, batch.index_N],
            student.head,
            batch.rows,
            vocab_size=student.vocab_size,
        )
    return float(total) / batch.num_rows


def tokenized(world: World, path: Path, views: ViewSettings) -> Path:
    tokenize_file(world.sample, path, ChatTokenizer(world.tokenizer), TokenizeSettings(views=views))
    return path


def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    world: World, engine: TransformersEngine, student: Student, tmp_path: Path
) -> None:
    """And shifting rows, outputs or tokens by one, either way, is seen at once."""
    tokens = tokenized(world, tmp_path / "tokens.parquet", ViewSettings(max_tokens=4096))
    data = populated(engine, student, tokens, tmp_path / "cache")
    chosen = [0, 1, 2]
    batch = data[chosen]
    aligned = kl(student, batch)
    assert aligned < 1e-6
    for shift in (-1, 1):
        assert kl(student, replace(batch, index_N=batch.index_N + shift)) > 100 * max(aligned, 1e-6)
        rows = {n: getattr(batch.rows, n).roll(shift, 0) for n in ("ids_NK", "logprobs_NK", "tail_logmass_N")}
        assert kl(student, replace(batch, rows=replace(batch.rows, **rows))) > 100 * max(aligned, 1e-6)
        moved = batch.token_ids_BT.roll(shift, 1)
        assert kl(student, replace(batch, token_ids_BT=moved)) > 100 * max(aligned, 1e-6)


def test_without_the_caches_rounding_next_to_nothing_is_left(
    world: World, engine: TransformersEngine, student: Student, tmp_path: Path
) -> None:
    tokens = tokenized(world, tmp_path / "tokens.parquet", ViewSettings(max_tokens=4096))
    data = populated(engine, student, tokens, tmp_path / "cache")
    (one, *_) = data.trajectories

    async def score() -> TopKRows:
        async with aclosing(engine.score(one.token_ids, one.positions, top_k=64)) as parts:
            return concatenate([part async for part in parts])

    rows = asyncio.run(score())
    batch = data[[0]]
    exact = replace(
        batch.rows,
        logprobs_NK=torch.from_numpy(rows.logprobs.copy()),
        tail_logmass_N=torch.from_numpy(rows.tail_logmass.copy()),
    )
    assert abs(kl(student, replace(batch, rows=exact))) < 1e-7


def test_an_internalized_view_is_aligned(
    world: World, engine: TransformersEngine, student: Student, tmp_path: Path
) -> None:
    """The student no longer sees the task, so its KL is not zero; it is least where the rows belong."""
    views = ViewSettings(internalized=("task",), max_tokens=4096)
    data = populated(engine, student, tokenized(world, tmp_path / "t.parquet", views), tmp_path / "cache")
    batch = data[[0, 1, 2]]
    aligned = kl(student, batch)
    for one in data.trajectories:
        assert len(one.student_ids) < len(one.token_ids)
    shifted = [kl(student, replace(batch, index_N=batch.index_N + shift)) for shift in (-2, -1, 1, 2)]
    assert aligned < 0.1 * min(shifted)
