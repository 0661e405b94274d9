"""Tests of the work queue's contract for both implementations."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyperagent.errors import ConfigError, ServiceError, StorageError
from hyperagent.populate.queue import Claim, Finished, WorkItem, WorkQueue
from hyperagent.populate.redis_queue import RedisQueue
from hyperagent.populate.sqlite_queue import SqliteQueue

LEASE_S = 0.3
ITEMS = [WorkItem(f"{row:064x}", row, f"t{row}", 10 + row, 3) for row in range(4)]

Open = Callable[..., WorkQueue]


def open_queue(place: str, *, name: str = "n", max_tries: int = 3, lease_s: float = 60.0) -> WorkQueue:
    if place.startswith("redis://"):
        return RedisQueue(place, name=name, max_tries=max_tries, lease_s=lease_s)
    return SqliteQueue(Path(place), name=name, max_tries=max_tries, lease_s=lease_s)


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "queue" / "work.sqlite")
    return str(request.getfixturevalue("redis_server").url)


@pytest.fixture
def opened(place: str) -> Iterator[Open]:
    """Return a function that opens the queue like another process, any number of times."""
    queues: list[WorkQueue] = []

    def open_one(**options: Any) -> WorkQueue:
        queues.append(open_queue(place, **options))
        return queues[-1]

    yield open_one
    for queue in queues:
        queue.close()


def taken(queue: WorkQueue, worker: str = "w") -> Claim:
    claim = queue.claim(worker)
    assert claim is not None
    return claim


def finished(claim: Claim) -> Finished:
    return Finished(claim.item, "written", cache_key="ab", record_digest="cd")


def test_items_come_once_in_order_and_end(opened: Open) -> None:
    queue = opened()
    queue.fill(ITEMS)
    claims = [taken(queue) for _ in ITEMS]
    assert [claim.item for claim in claims] == ITEMS
    assert {claim.tries for claim in claims} == {1}
    assert queue.claim("w") is None
    counts = queue.counts()
    assert (counts.pending, counts.claimed, counts.finished, counts.is_over) == (0, 4, 0, False)
    assert (counts.tokens_total, counts.tokens_over) == (46, 0)
    for claim in reversed(claims):
        queue.finish(claim, finished(claim))
    assert queue.counts().is_over
    assert queue.counts().tokens_over == 46
    assert list(queue.finished()) == [finished(claim) for claim in claims]
    assert queue.quarantined() == []


def test_filling_again_joins_a_round_in_progress(opened: Open) -> None:
    first, second = opened(), opened()
    first.fill(ITEMS[:3])
    claim = taken(first)
    first.finish(claim, finished(claim))
    second.fill(ITEMS)
    assert second.counts().finished == 1
    assert [taken(second).item.row for _ in range(3)] == [1, 2, 3]
    assert second.claim("w") is None


def test_filling_after_the_end_begins_a_new_round(opened: Open) -> None:
    queue = opened(max_tries=1)
    queue.fill(ITEMS[:2])
    claim = taken(queue)
    queue.finish(claim, finished(claim))
    assert queue.fail(taken(queue), "it burns")
    assert queue.counts().is_over
    queue.fill(ITEMS[:2])
    counts = queue.counts()
    assert (counts.pending, counts.finished, counts.quarantined, counts.tokens_total, counts.tokens_over) == (
        2,
        0,
        0,
        21,
        0,
    )
    assert [taken(queue).tries for _ in range(2)] == [1, 1]


def test_populations_of_other_names_are_apart(opened: Open) -> None:
    queue, other = opened(), opened(name="other")
    queue.fill(ITEMS)
    assert other.claim("w") is None
    other.fill(ITEMS[:1])
    assert (queue.counts().pending, other.counts().pending) == (4, 1)


def test_an_item_that_fails_goes_to_the_back_and_is_quarantined_in_the_end(opened: Open) -> None:
    queue = opened(max_tries=2)
    queue.fill(ITEMS[:2])
    assert queue.fail(taken(queue), "first reason") is False
    claim = taken(queue)
    assert claim.item.row == 1
    queue.finish(claim, finished(claim))
    again = taken(queue)
    assert (again.item.row, again.tries) == (0, 2)
    assert queue.fail(again, "second reason") is True
    (item,) = queue.quarantined()
    assert (item.item, item.tries, item.reason) == (ITEMS[0], 2, "second reason")
    counts = queue.counts()
    assert counts.is_over
    assert (counts.quarantined, counts.tokens_over) == (1, 21)


def test_a_try_that_is_given_back_does_not_count(opened: Open) -> None:
    queue = opened(max_tries=1)
    queue.fill(ITEMS[:1])
    for _ in range(5):
        claim = taken(queue)
        assert claim.tries == 1
        queue.give_back(claim)
    assert queue.counts().pending == 1


def test_a_lapsed_claim_is_handed_out_again_and_its_holder_is_told(opened: Open) -> None:
    queue = opened(lease_s=LEASE_S)
    queue.fill(ITEMS[:1])
    lapsed = taken(queue, "vanished")
    assert queue.claim("other") is None
    time.sleep(LEASE_S * 1.3)
    again = taken(queue, "other")
    assert (again.item, again.tries) == (ITEMS[0], 2)
    assert queue.renew(lapsed) is False
    assert queue.fail(lapsed, "late") is False
    queue.give_back(lapsed)
    assert queue.counts().claimed == 1
    queue.finish(lapsed, finished(lapsed))
    queue.finish(again, replace(finished(again), outcome="present"))
    assert [f.outcome for f in queue.finished()] == ["written"]
    assert queue.counts().is_over
    assert queue.claim("other") is None


def test_a_renewed_claim_does_not_lapse(opened: Open) -> None:
    queue = opened(lease_s=LEASE_S)
    queue.fill(ITEMS[:1])
    claim = taken(queue)
    for _ in range(4):
        time.sleep(LEASE_S / 2)
        assert queue.renew(claim) is True
        assert queue.claim("other") is None


def test_an_item_whose_workers_vanish_is_quarantined(opened: Open) -> None:
    queue = opened(max_tries=2, lease_s=0.1)
    queue.fill(ITEMS[:1])
    for tries in (1, 2):
        assert taken(queue, f"w{tries}").tries == tries
        time.sleep(0.15)
    assert queue.claim("w3") is None
    (item,) = queue.quarantined()
    assert (item.tries, item.reason) == (2, "its worker vanished 2 times")


def test_many_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def open_when_all_are_ready(place: str) -> None:
        start.wait(60)
        open_queue(place).close()

    with ThreadPoolExecutor(8) as pool:
        for round_ in range(20):
            for opening in [pool.submit(open_when_all_are_ready, str(tmp_path / f"{round_}.sqlite")) for _ in range(8)]:
                opening.result()


def _work(place: str, worker: str, start: Any, results: Any) -> None:
    queue = open_queue(place, lease_s=5.0)
    start.wait(60)
    queue.fill([replace(ITEMS[0], item_id=f"{row:064x}", row=row) for row in range(200)])
    while not queue.counts().is_over:
        if (claim := queue.claim(worker)) is not None:
            results.put((worker, claim.item.row))
            time.sleep(0.005)
            queue.finish(claim, finished(claim))
    queue.close()


def test_two_processes_share_the_items(place: str, opened: Open) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_work, args=(place, name, start, results)) for name in ("a", "b")]
    for worker in workers:
        worker.start()
    done = [results.get(timeout=60) for _ in range(200)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(row for _, row in done) == list(range(200))
    assert {name for name, _ in done} == {"a", "b"}
    assert [f.item.row for f in opened().finished()] == list(range(200))


def _hold(place: str, ready: Any) -> None:
    queue = open_queue(place, lease_s=LEASE_S)
    assert queue.claim("victim") is not None
    ready.set()
    time.sleep(60)


def test_what_a_killed_worker_held_is_handed_out_again(place: str, opened: Open) -> None:
    queue = opened(lease_s=LEASE_S)
    queue.fill(ITEMS[:1])
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    victim = context.Process(target=_hold, args=(place, ready))
    victim.start()
    assert ready.wait(30)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(30)
    time.sleep(LEASE_S * 1.2)
    assert taken(queue).tries == 2


def test_two_may_fill_at_once(opened: Open) -> None:
    queues = [opened() for _ in range(2)]
    threads = [threading.Thread(target=queue.fill, args=(ITEMS,)) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queues[0].counts().pending == 4
    assert queues[0].counts().tokens_total == 46


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "work.sqlite"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError, match="not a database") as refusal:
        open_queue(str(path))
    assert "\n" not in str(refusal.value)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "work.sqlite"
    open_queue(str(path)).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 77")
    with pytest.raises(ConfigError, match="version 77"):
        open_queue(str(path))


def test_a_redis_that_is_gone_is_one_sentence(redis_server: Any) -> None:
    queue = open_queue(redis_server.url)
    queue.fill(ITEMS)
    redis_server.kill()
    with pytest.raises(ServiceError, match="and that Redis is running") as refusal:
        queue.claim("w")
    assert "\n" not in str(refusal.value)
    with pytest.raises(ServiceError, match="and that Redis is running"):
        open_queue(redis_server.url)
