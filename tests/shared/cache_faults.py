"""Inject faults while a cache is written; runs in a process with faults.c preloaded (see `cache/test_faults.py`).

    python cache_faults.py errors | kills FOLDER       every call, one after the other
    python cache_faults.py random FOLDER [--kills N]   SIGKILL at random moments

After each fault, a trajectory whose `put` returned must read exactly as it was put, no other trajectory may be
readable, nothing may be damaged, and the same `put` must succeed without the fault.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cache_rows import IDENTITY, random_rows

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.stats import count
from hyperagent.cache.maintenance.verify import verify
from hyperagent.errors import CorruptRecord, StorageError

OPEN, WRITE, SYNC, RENAME, TRUNCATE, READ = (1 << bit for bit in range(6))
FAIL_ONCE, FAIL_FROM, KILL_BEFORE, KILL_AFTER = 1, 2, 3, 4
CHANGES = WRITE | SYNC | RENAME | TRUNCATE | OPEN
ERRORS = {
    "ENOSPC": (errno.ENOSPC, WRITE | TRUNCATE | RENAME, FAIL_FROM),
    "ENOSPC once": (errno.ENOSPC, WRITE | TRUNCATE | RENAME, FAIL_ONCE),
    "EIO": (errno.EIO, CHANGES, FAIL_ONCE),
    "EIO from then on": (errno.EIO, CHANGES, FAIL_FROM),
    "EIO on reading": (errno.EIO, READ, FAIL_ONCE),
    "EMFILE": (errno.EMFILE, OPEN, FAIL_FROM),
    "EMFILE once": (errno.EMFILE, OPEN, FAIL_ONCE),
}
SETTINGS = CacheSettings(codec="exact", block_tokens=16)
SHARD_BYTES = 6000
"""Small enough for the test's trajectories to reach it, so that faults also hit sealing."""
_faults = ctypes.CDLL(None)


def arm(folder: Path, kinds: int, nth: int, action: int, error: int = 0) -> None:
    _faults.faults_arm(str(folder).encode(), kinds, ctypes.c_long(nth), action, error)


def disarm() -> int:
    return int(_faults.faults_disarm())


def tokens(number: int) -> np.ndarray:
    return np.arange(number, number + 90, dtype=np.uint32)


def rows(number: int):
    return random_rows(20 + number % 20, 8, seed=number)


def open_cache(root: Path) -> LocalCache:
    return LocalCache.create_or_open(root, IDENTITY, settings=SETTINGS, shard_bytes=SHARD_BYTES)


def put(root: Path, number: int) -> None:
    with open_cache(root) as cache:
        cache.put(tokens(number), rows(number))


def check(root: Path, acknowledged: set[int], perhaps: set[int]) -> None:
    """Assert the module's invariants after a fault; `perhaps` were being put when the process was killed."""
    with open_cache(root) as cache:
        keys = {number: cache.key(tokens(number), rows(number).positions) for number in acknowledged | perhaps}
        found = set(cache.trajectory_keys())
        assert {keys[number] for number in acknowledged} <= found, "an acknowledged trajectory is lost"
        assert found <= set(keys.values()), "a trajectory is there that nobody has put"
        for number, key in keys.items():
            if key in found:
                read, meant = cache.get(key).rows, rows(number)
                assert np.array_equal(np.sort(read.ids), np.sort(meant.ids)), "other rows than were put"
                assert np.array_equal(read.positions, meant.positions)
        report = verify(cache)
        assert not report.damaged, report.damaged
        assert not report.incomplete, report.incomplete
        assert count(cache).dead_bytes == 0, "bytes that nobody accounts for"


def every_error(folder: Path, step: int) -> dict[str, int]:
    """Make each `step`-th call fail in turn, with each error; return the calls per error, rounded up to whole steps."""
    calls = {}
    for name, (number, kinds, action) in ERRORS.items():
        for nth in itertools.count(1, step):
            root = folder / "cache"
            shutil.rmtree(root, ignore_errors=True)
            done: set[int] = set()
            said: list[str] = []
            arm(root, kinds, nth, action, number)
            for trajectory in range(4):
                try:
                    put(root, trajectory)
                except (StorageError, CorruptRecord) as error:
                    said.append(str(error))
                else:
                    done.add(trajectory)
            assert all(len(line.splitlines()) == 1 for line in said)
            happened = disarm() >= nth
            # A commit that reported an error may still have happened; then the whole trajectory must be readable.
            check(root, done, set(range(4)) - done)
            for trajectory in range(4):
                put(root, trajectory)
            check(root, {0, 1, 2, 3}, set())
            if not happened:
                calls[name] = nth - 1
                break
    return calls


def in_child(work: Callable[[int], None]) -> tuple[set[int], int]:
    """Run `work` in a forked process, which may be killed; return the trajectories it acknowledged, and its status."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        status = 1
        try:
            work(writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        acknowledged = set(pipe.read())
    return acknowledged, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def every_kill(folder: Path, step: int) -> dict[str, int]:
    """Kill the process before and after each `step`-th call in turn; return the calls, rounded up to whole steps."""
    calls = {}
    for name, action in (("before", KILL_BEFORE), ("after", KILL_AFTER)):
        for nth in itertools.count(1, step):
            root = folder / "cache"
            shutil.rmtree(root, ignore_errors=True)

            def work(pipe: int, root: Path = root, nth: int = nth, action: int = action) -> None:
                arm(root, CHANGES, nth, action)
                for trajectory in range(4):
                    put(root, trajectory)
                    os.write(pipe, bytes([trajectory]))

            acknowledged, status = in_child(work)
            assert status in (0, -signal.SIGKILL), status
            check(root, acknowledged, {len(acknowledged)} if status else set())
            for trajectory in range(4):
                put(root, trajectory)
            check(root, {0, 1, 2, 3}, set())
            if status == 0:
                calls[name] = nth - 1
                break
    return calls


def random_kills(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill a process that puts trajectories one after the other, at random moments."""
    chance = random.Random(seed)
    done = put_in_all = rounds = 0
    while done < kills:
        root = folder / f"cache{rounds}"
        acknowledged: set[int] = set()
        perhaps: set[int] = set()
        # Start a new cache occasionally, so that creating one is interrupted too, and checking stays fast.
        for _ in range(25):
            reading, writing = os.pipe()
            process = os.fork()
            if process == 0:
                os.close(reading)
                with open_cache(root) as cache:
                    for number in itertools.cycle(range(200)):
                        cache.put(tokens(number), rows(number))
                        os.write(writing, bytes([number]))
                os._exit(1)
            os.close(writing)
            # Every second process lives at least until its first answer, however busy the machine is.
            first = os.read(reading, 1) if chance.random() < 0.5 else b""
            time.sleep(chance.expovariate(1 / 0.02))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            with os.fdopen(reading, "rb") as pipe:
                said = list(first + pipe.read())
            acknowledged |= set(said)
            # If killed between the commit and the acknowledgment, the trajectory may exist, and must then be complete.
            perhaps.add((said[-1] + 1) % 200 if said else 0)
            check(root, acknowledged, perhaps)
            done += 1
        put_in_all += len(acknowledged)
        shutil.rmtree(root)
        rounds += 1
    return {"kills": done, "acknowledged": put_in_all, "violations": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["errors", "kills", "random"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--step", type=int, default=1, help="fail or kill at one call in so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "random":
        result = random_kills(options.folder, options.kills, options.seed)
    else:
        result = (every_error if options.what == "errors" else every_kill)(options.folder, options.step)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
