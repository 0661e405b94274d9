"""Test that training gives the same results however rows are read from the cache and whatever happens to the hot tier."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from tiny_runs import losses, metrics, run
from torch.utils.data import DataLoader, Dataset

from hyperagent.cache.hot_tier import HotTier
from hyperagent.cache.local import LocalCache
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import TRAIN
from hyperagent.errors import ServiceError
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.data.dataset import load_split, or_reason
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.training.trainer import train

STEPS = 12


@pytest.fixture
def short(recipe: TrainRecipe) -> TrainRecipe:
    return recipe.model_copy(update={"num_steps": STEPS, "evaluate_every": STEPS, "batch_size": 3})


class DuringRun(threading.Event):
    """Stop event that performs an action once, when training checks it after its 6th step."""

    def __init__(self, folder: RunFolder, action: Callable[[], object]) -> None:
        super().__init__()
        self._folder = folder
        self._action = action
        self._is_done = False

    def is_set(self) -> bool:
        if not self._is_done and self._folder.metrics.exists() and len(steps(self._folder)) == 6:
            self._is_done = True
            self._action()
        return False


def of_another_type(client: redis.Redis) -> None:
    for name in client.scan_iter():
        client.delete(name)
        client.lpush(name, "x")


def steps(folder: RunFolder) -> list[dict[str, Any]]:
    return [line for line in metrics(folder) if "loss" in line]


def full(client: redis.Redis) -> None:
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    client.flushall()


@pytest.mark.parametrize("fault", ["none", "killed", "frozen", "flushed", "full", "another type", "damaged"])
def test_nothing_that_befalls_redis_changes_a_bit_of_the_loss(
    short: TrainRecipe, tmp_path: Path, redis_server: Any, fault: str
) -> None:
    expected = losses(run(short, tmp_path / "without"))
    hits = []

    def strike() -> None:
        with redis.Redis.from_url(redis_server.url) as client:
            hits.append(client.info("stats")["keyspace_hits"])
            match fault:
                case "flushed":
                    client.flushall()
                case "full":
                    full(client)
                case "another type":
                    of_another_type(client)
                case "damaged":
                    for name in client.scan_iter():
                        client.setrange(name, 150, b"\xff" * 8)
        if fault == "killed":
            redis_server.kill()
        elif fault == "frozen":
            redis_server.freeze()

    folder = RunFolder(tmp_path / "with")
    folder.root.mkdir()
    train(short, folder, DuringRun(folder, strike), redis_url=redis_server.url)
    assert folder.read_status().state == "done"
    assert hits[0] > 0
    assert losses(folder) == expected
    assert len(expected) == STEPS
    before, after = (
        {name: sum(line[name] for line in part) for name in ("hot_hits", "hot_misses", "hot_degraded")}
        for part in (steps(folder)[:6], steps(folder)[6:])
    )
    assert before["hot_hits"] > 0
    assert before["hot_degraded"] == 0
    assert (after["hot_degraded"] > 0) == (fault in ("killed", "frozen", "full"))
    assert (after["hot_misses"] > 0) == (fault != "none")


def test_batches_come_in_order_from_any_number_of_workers(
    student_folder: Path, tokens_file: Path, cache_folder: Path, redis_server: Any
) -> None:
    identity = ChatTokenizer(student_folder).identity
    with LocalCache.open(cache_folder, hot=HotTier.connect(redis_server.url)) as cache:
        data = load_split(tokens_file, cache, TRAIN, tokenizer=identity, max_prompt_tokens=64)
        order = [[2, 0], [7], [1, 3, 4], [0, 2], [5, 6]]
        device = torch.device("cpu")
        state = torch.random.get_rng_state()
        alone = list(data.batches(order, device, workers=0))
        assert [list(batch.indices) for batch in alone] == order
        shared = list(data.batches(order, device, workers=2))
        assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(alone, shared, strict=True):
        assert (one.indices, one.num_tokens) == (other.indices, other.num_tokens)
        for name in ("token_ids_BT", "sample_N", "index_N"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        for name in ("ids_NK", "logprobs_NK", "tail_logmass_N", "target_ids_N"):
            assert torch.equal(getattr(one.rows, name), getattr(other.rows, name))


class _Fails(Dataset[int]):
    """A data set whose reading process hangs or is killed."""

    def __init__(self, number: int | None) -> None:
        self.number = number

    def __getitem__(self, _index: int) -> int:
        if self.number is not None:
            os.kill(os.getpid(), self.number)
        time.sleep(2.5)
        return 0


@pytest.mark.parametrize(("number", "said"), [(None, "timed out"), (signal.SIGKILL, "worker")])
def test_a_worker_that_goes_silent_or_dies_is_a_reason(number: int | None, said: str) -> None:
    loader = DataLoader(
        _Fails(number), batch_size=None, sampler=[0], num_workers=1, timeout=1, multiprocessing_context="fork"
    )
    with pytest.raises(ServiceError, match=rf"{said}.*/dev/shm.*loader_workers"):
        list(or_reason(iter(loader)))


def test_another_error_of_a_reader_stays_what_it_is() -> None:
    def batches() -> Iterator[Any]:
        raise RuntimeError("a defect")
        yield

    with pytest.raises(RuntimeError, match="a defect"):
        list(or_reason(batches()))


@pytest.mark.timeout(180)
def test_a_run_with_workers_is_the_run_without(short: TrainRecipe, tmp_path: Path) -> None:
    alone = run(short, tmp_path / "alone")
    shared = run(short.model_copy(update={"loader_workers": 2}), tmp_path / "shared")
    assert losses(shared) == losses(alone)
    waits = [line["data_wait_s"] for line in steps(shared)]
    assert len(waits) == STEPS
    assert min(waits) >= 0
