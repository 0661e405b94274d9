"""Test joining trajectories with the cache, and the order of training."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_identity import data_identity

from hyperagent.cache.base import CacheReader
from hyperagent.cache.format.shard import SHARD_HEADER_BYTES, read_footer
from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.publish import publish
from hyperagent.cache.remote import open_for_reading
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import HELD_OUT, TRAIN, read_tokens, write_tokens
from hyperagent.errors import ConfigError, CorruptRecord, DataError, IdentityMismatch, LimitExceeded
from hyperagent.identity import TokenizerIdentity
from hyperagent_trainer.data.dataset import load_split


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_loading_a_split_looks_up_and_reads_no_record(
    student_folder: Path, tokens_file: Path, cache_folder: Path, tmp_path: Path, kind: str
) -> None:
    root = shutil.copytree(cache_folder, tmp_path / "cache")
    with LocalCache.open(root) as cache:
        publish(cache, f"file://{tmp_path}/published")
    # Every byte of every record is wiped, so that reading any record fails.
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
            data[[0]]


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
        assert torch.equal(getattr(hidden.rows, name), getattr(full.rows, name))


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
            # The teacher of this cache gives the actual token the highest probability.
            assert batch.rows.ids_NK[place, batch.rows.logprobs_NK[place].argmax()] == trajectory.token_ids[position]
            place += 1
    assert batch.num_rows == place
    assert batch.num_tokens == sum(len(data.trajectories[i].student_ids) for i in (2, 0))
    mass = batch.rows.logprobs_NK.double().exp().sum(1) + batch.rows.tail_logmass_N.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)


def test_rows_are_softened_as_the_recipe_says(student_folder: Path, tokens_file: Path, cache_folder: Path) -> None:
    identity = ChatTokenizer(student_folder).identity
    with LocalCache.open(cache_folder) as cache:
        data = load_split(tokens_file, cache, TRAIN, tokenizer=identity, max_prompt_tokens=64, temperature=2.0)
        rows = data[[0]].rows
    # One id has 0.8 and the other kept ids 0.1 together; the rest is spread evenly over nine ids, see `cache_folder`.
    k = rows.ids_NK.shape[1]
    flat = np.sqrt([0.8, *[0.1 / (k - 1)] * (k - 1), *[0.1 / 9] * 9])
    expected = flat / flat.sum()
    assert rows.temperature == 2
    np.testing.assert_allclose(rows.logprobs_NK[0].exp(), expected[:k], rtol=1e-3)
    np.testing.assert_allclose(rows.tail_logmass_N[0].exp(), expected[k:].sum(), rtol=1e-3)


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


def test_a_trajectory_is_hashed_once_however_often_it_is_read(
    student_folder: Path, tokens_file: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, hashed = CacheReader.key, []

    def counted(self: CacheReader, token_ids: np.ndarray, positions: np.ndarray) -> str:
        hashed.append(len(token_ids))
        return original(self, token_ids, positions)

    monkeypatch.setattr(CacheReader, "key", counted)
    identity = ChatTokenizer(student_folder).identity
    with LocalCache.open(cache_folder) as cache:
        data = load_split(tokens_file, cache, TRAIN, tokenizer=identity, max_prompt_tokens=64).with_full_views()
        for _ in range(2):
            for index in range(len(data.trajectories)):
                data[[index]]
    assert len(hashed) == len(data.trajectories) / 2


def test_a_worker_gets_no_more_for_a_larger_split(student_folder: Path, tokens_file: Path, cache_folder: Path) -> None:
    identity = ChatTokenizer(student_folder).identity
    with LocalCache.open(cache_folder) as cache:
        data = load_split(tokens_file, cache, TRAIN, tokenizer=identity, max_prompt_tokens=64)
        larger = data.with_full_views()
        sent = [len(pickle.dumps(split.reader)) for split in (data, larger)]
    assert len(larger.trajectories) == 2 * len(data.trajectories)
    assert sent[0] == sent[1] < 4096
