"""Joining trajectories with the cache, and the order of training."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_identity import data_identity
from hypothesis import given
from hypothesis import strategies as st

from hyperagent.cache.format.shard import SHARD_HEADER_BYTES, read_footer
from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.publish import publish
from hyperagent.cache.remote import open_for_reading
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import HELD_OUT, TRAIN, read_tokens, write_tokens
from hyperagent.errors import ConfigError, CorruptRecord, DataError, IdentityMismatch, LimitExceeded
from hyperagent.identity import TokenizerIdentity
from hyperagent_trainer.data.dataset import batch_order, batches_from, load_split
from hyperagent_trainer.evaluation.evaluate import foreign_prompts


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 9))
def test_every_trajectory_occurs_once_an_epoch(lengths: list[int], batch_size: int, seed: int) -> None:
    batches = batch_order(lengths, batch_size=batch_size, seed=seed, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert max(len(batch) for batch in batches) <= batch_size


def test_epochs_differ_and_seeds_decide() -> None:
    lengths = list(range(1, 41))
    first = batch_order(lengths, batch_size=4, seed=0, epoch=0)
    assert first == batch_order(lengths, batch_size=4, seed=0, epoch=0)
    assert first != batch_order(lengths, batch_size=4, seed=0, epoch=1)
    assert first != batch_order(lengths, batch_size=4, seed=1, epoch=0)


def test_a_later_start_sees_what_it_would_have_seen() -> None:
    lengths = list(range(1, 12))
    whole = batches_from(lengths, batch_size=3, seed=0, first_step=0)
    expected = [next(whole) for _ in range(12)][7:]
    later = batches_from(lengths, batch_size=3, seed=0, first_step=7)
    assert [next(later) for _ in range(5)] == expected


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 9), st.floats(0.01, 1))
def test_every_trajectory_occurs_once_in_one_of_its_views(num: int, batch_size: int, seed: int, share: float) -> None:
    lengths = list(range(1, 2 * num + 1))
    batches = batch_order(lengths, batch_size=batch_size, seed=seed, epoch=0, full_view_share=share)
    assert sorted(i % num for batch in batches for i in batch) == list(range(num))
    if share == 1:
        assert all(i >= num for batch in batches for i in batch)


def test_the_share_of_full_views_is_kept_and_falls_on_others_each_epoch() -> None:
    lengths = [10] * 4000
    full = [
        {
            i
            for batch in batch_order(lengths, batch_size=8, seed=0, epoch=e, full_view_share=0.3)
            for i in batch
            if i >= 2000
        }
        for e in (0, 1)
    ]
    assert all(540 <= len(samples) <= 660 for samples in full)
    assert len(full[0] & full[1]) < 250


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_loading_a_split_looks_up_and_reads_no_record(
    student_folder: Path, tokens_file: Path, cache_folder: Path, tmp_path: Path, kind: str
) -> None:
    root = shutil.copytree(cache_folder, tmp_path / "cache")
    with LocalCache.open(root) as cache:
        publish(cache, f"file://{tmp_path}/published")
    # Every byte of every record is wiped, so that whoever reads one is refused.
    for shard in [*root.glob("shards/*.shard"), *tmp_path.glob("published/shards/*.shard")]:
        _, end = read_footer(shard)
        with shard.open("r+b") as file:
            file.seek(SHARD_HEADER_BYTES)
            file.write(bytes(end - SHARD_HEADER_BYTES))
    identity = ChatTokenizer(student_folder).identity
    with open_for_reading(root if kind == "local" else f"file://{tmp_path}/published") as reader:
        assert not any(reader.is_intact(key) for key in reader.trajectory_keys())
        data = load_split(tokens_file, reader, TRAIN, tokenizer=identity, max_prompt_tokens=64)
        assert len(data.trajectories) > 1
        with pytest.raises(CorruptRecord):
            data.rows(0)


def test_a_full_view_has_the_same_rows_at_the_teachers_positions(
    student_folder: Path, tokens_file: Path, cache_folder: Path
) -> None:
    cache = LocalCache.open(cache_folder)
    data = load_split(tokens_file, cache, TRAIN, tokenizer=ChatTokenizer(student_folder).identity, max_prompt_tokens=64)
    both = data.with_full_views()
    hidden, full = both[[1]], both[[1 + len(data.trajectories)]]
    assert hidden.num_tokens < full.num_tokens == len(data.trajectories[1].token_ids)
    assert (full.index_N + 1).tolist() == data.trajectories[1].positions.tolist()
    for name in ("target_ids_N", "ids_NK", "logprobs_NK"):
        assert torch.equal(getattr(hidden, name), getattr(full, name))


def test_a_batch_points_at_the_output_before_each_position(
    student_folder: Path, tokens_file: Path, cache_folder: Path
) -> None:
    cache = LocalCache.open(cache_folder)
    identity = ChatTokenizer(student_folder).identity
    data = load_split(tokens_file, cache, TRAIN, tokenizer=identity, max_prompt_tokens=64)
    batch = data[[2, 0]]

    place = 0
    for sample, index in enumerate([2, 0]):
        trajectory = data.trajectories[index]
        for position in trajectory.positions:
            assert batch.sample_N[place] == sample
            assert batch.index_N[place] == position - 1
            # The teacher of this cache is surest of the token that really stands at the position.
            assert batch.ids_NK[place, batch.logprobs_NK[place].argmax()] == trajectory.token_ids[position]
            place += 1
    assert batch.num_rows == place
    assert batch.num_tokens == sum(len(data.trajectories[i].student_ids) for i in (2, 0))
    mass = batch.logprobs_NK.double().exp().sum(1) + batch.tail_logmass_N.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)


def test_rows_are_softened_as_the_recipe_says(student_folder: Path, tokens_file: Path, cache_folder: Path) -> None:
    identity = ChatTokenizer(student_folder).identity
    with LocalCache.open(cache_folder) as cache:
        data = load_split(tokens_file, cache, TRAIN, tokenizer=identity, max_prompt_tokens=64, temperature=2.0)
        batch = data[[0]]
    # One id has 0.8 and the other kept ones 0.1 together; the rest is spread evenly over nine ids, see `cache_folder`.
    k = batch.ids_NK.shape[1]
    flat = np.sqrt([0.8, *[0.1 / (k - 1)] * (k - 1), *[0.1 / 9] * 9])
    expected = flat / flat.sum()
    assert batch.temperature == 2
    np.testing.assert_allclose(batch.logprobs_NK[0].exp(), expected[:k], rtol=1e-3)
    np.testing.assert_allclose(batch.tail_logmass_N[0].exp(), expected[k:].sum(), rtol=1e-3)


def test_what_does_not_belong_together_is_refused(
    student_folder: Path, tokens_file: Path, cache_folder: Path, tmp_path: Path
) -> None:
    cache = LocalCache.open(cache_folder)
    identity = ChatTokenizer(student_folder).identity
    with pytest.raises(IdentityMismatch, match="tokenize the data with the student's tokenizer"):
        load_split(tokens_file, cache, TRAIN, tokenizer=TokenizerIdentity("a", "b"), max_prompt_tokens=64)
    with pytest.raises(LimitExceeded, match="max_prompt_tokens is 5"):
        load_split(tokens_file, cache, TRAIN, tokenizer=identity, max_prompt_tokens=5)

    with pytest.raises(ConfigError, match="has rows at temperatures 1, 2, not at 3"):
        load_split(tokens_file, cache, TRAIN, tokenizer=identity, max_prompt_tokens=64, temperature=3.0)

    other = tmp_path / "other.parquet"
    with write_tokens(other, data_identity(identity, source="f" * 64)) as writer:
        for trajectory in read_tokens(tokens_file):
            writer.write(trajectory)
    with pytest.raises(IdentityMismatch, match=r"was not populated from data .*; run `hyperagent cache populate`"):
        load_split(other, cache, TRAIN, tokenizer=identity, max_prompt_tokens=64)

    cache.close()
    shutil.copytree(cache_folder, tmp_path / "cache")
    copy = LocalCache.open(tmp_path / "cache")
    trajectory = next(read_tokens(tokens_file, split=HELD_OUT))
    with copy.index.transaction():
        copy.index.remove([bytes.fromhex(copy.key(trajectory.token_ids, trajectory.positions))])
    with pytest.raises(DataError, match="lacks 1 of 3 held_out trajectories, the first is 't8'"):
        load_split(tokens_file, copy, HELD_OUT, tokenizer=identity, max_prompt_tokens=64)


def test_shuffled_prompts_are_never_of_the_same_repository(tokens_file: Path) -> None:
    held_out = tuple(read_tokens(tokens_file, split=HELD_OUT))
    train = tuple(read_tokens(tokens_file, split=TRAIN))
    for trajectory, prompt in zip(held_out, foreign_prompts(held_out, train, seed=0), strict=True):
        assert not np.array_equal(prompt, trajectory.prompt_ids)
    (alone,) = foreign_prompts(held_out[:1], train, seed=0)
    assert any(np.array_equal(alone, t.prompt_ids) for t in train)
