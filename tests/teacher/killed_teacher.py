"""Kill a teacher at random times while it fills a cache and restart it: no row may be lost, duplicated or changed.

    python tests/teacher/killed_teacher.py --kills 500

Teachers are forked from a process that has already imported torch, so that most of the time is spent in the part that
can fail. Each teacher runs the service's own `serve` and is killed with SIGKILL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.verify import verify
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import TRAIN, TokenizedTrajectory, read_data_identity, write_tokens
from hyperagent.identity import DataIdentity
from hyperagent.populate.run import PopulateReport, find_teachers, open_queue, populate, work_items
from hyperagent.wire.client import TeacherClient

TOKEN = "a-token"
PRELOAD = ["torch", "transformers", "hyperagent_teacher.service.server", "hyperagent_teacher.engines.transformers"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of a population whose teacher was killed."""

    kills: int
    kills_with_work_in_progress: int
    trajectories: int
    rows: int
    lost: int
    duplicated: int
    changed: int
    damaged: int
    quarantined: int
    digest_equal: bool
    seconds: float

    @property
    def is_clean(self) -> bool:
        """Whether every row is there exactly once and unchanged."""
        return self.digest_equal and not (
            self.lost or self.duplicated or self.changed or self.damaged or self.quarantined
        )


def write_trajectories(path: Path, model: Path, *, count: int, num_tokens: int) -> None:
    """Write a tokens file of random trajectories."""
    tokenizer = ChatTokenizer(model)
    identity = DataIdentity(tokenizer.identity, "0" * 64, {})
    generator = np.random.default_rng(0)
    with write_tokens(path, identity) as file:
        for number in range(count):
            ids = generator.integers(0, tokenizer.vocab_size, num_tokens).astype(np.uint32)
            positions = np.arange(num_tokens // 2, num_tokens, dtype=np.uint32)
            file.write(TokenizedTrajectory(f"t{number}", "a/b", TRAIN, ids, positions, ids[:8], ids, positions))


def run(model: Path, folder: Path, *, kills: int, trajectories: int, num_tokens: int, seed: int) -> Verdict:
    """Populate one cache without kills and another with a teacher that is killed, and compare the two."""
    started = time.monotonic()
    tokens = folder / "tokens.parquet"
    write_trajectories(tokens, model, count=trajectories, num_tokens=num_tokens)
    with _teacher(model, folder / "whole") as teacher:
        whole = asyncio.run(_populate(tokens, teacher.address, folder / "whole.sqlite"))
    chance = random.Random(seed)
    done = with_work = rounds = 0
    digests = set()
    report = whole
    while done < kills:
        # Each round has its own cache, so that it starts with all the work left.
        name = folder / f"killed{rounds}"
        with _teacher(model, name) as teacher:
            round_kills, round_with_work, report = asyncio.run(
                _populate_with_kills(tokens, teacher, folder / f"killed{rounds}.sqlite", kills - done, chance)
            )
        done, with_work, rounds = done + round_kills, with_work + round_with_work, rounds + 1
        digests.add(report.digest)
    return _compare(
        LocalCache.open(folder / "whole"),
        LocalCache.open(folder / f"killed{rounds - 1}"),
        tokens,
        kills=done,
        with_work=with_work,
        report=report,
        digest_equal=digests == {whole.digest},
        seconds=round(time.monotonic() - started, 1),
    )


def _compare(
    whole: LocalCache,
    killed: LocalCache,
    tokens: Path,
    *,
    kills: int,
    with_work: int,
    report: PopulateReport,
    digest_equal: bool,
    seconds: float,
) -> Verdict:
    keys, found = whole.trajectory_keys(), killed.trajectory_keys()
    checked = verify(killed)
    return Verdict(
        kills=kills,
        kills_with_work_in_progress=with_work,
        trajectories=len(list(work_items(tokens))),
        rows=sum(killed.trajectory(key).num_rows for key in found),
        lost=len(set(keys) - set(found)),
        duplicated=len(found) - len(set(keys)),
        changed=sum(whole.stored_digest(key) != killed.stored_digest(key) for key in set(keys) & set(found)),
        damaged=len(checked.damaged) + len(checked.incomplete),
        quarantined=len(report.quarantined),
        digest_equal=digest_equal and checked.digest == verify(whole).digest == report.digest,
        seconds=seconds,
    )


class _Teacher:
    """A teacher process on a fixed port that can be killed and restarted."""

    def __init__(self, model: Path, cache: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.address = f"127.0.0.1:{self.port}"
        self._model, self._cache = model, cache
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._process: Any = None
        self.start()

    def start(self) -> None:
        self._process = self._context.Process(target=_serve, args=(str(self._model), str(self._cache), self.port))
        self._process.start()

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()


@contextmanager
def _teacher(model: Path, cache: Path) -> Iterator[_Teacher]:
    teacher = _Teacher(model, cache)
    try:
        yield teacher
    finally:
        teacher.kill()


def _serve(model: str, cache: str, port: int) -> None:
    os.environ["GRPC_VERBOSITY"] = "NONE"
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # for the life of the process
    from hyperagent_teacher.config import TeacherSettings
    from hyperagent_teacher.service.server import serve

    settings = TeacherSettings(model=Path(model), cache=Path(cache), port=port, top_k=8, max_tokens=4096)
    serve(settings, token=TOKEN)


async def _populate(tokens: Path, address: str, queue_path: Path) -> PopulateReport:
    async with TeacherClient(address, TOKEN) as client:
        facts = await find_teachers([client], wait_s=120)
        queue = open_queue(
            str(queue_path),
            data=read_data_identity(tokens),
            teacher=facts.identity,
            max_tries=1000,
            lease_s=60,
        )
        try:
            return await populate(tokens, [client], queue, calls_per_teacher=1, lease_s=60, teacher_wait_s=120)
        finally:
            queue.close()


async def _populate_with_kills(
    tokens: Path, teacher: _Teacher, queue_path: Path, most: int, chance: random.Random
) -> tuple[int, int, PopulateReport]:
    """Return the number of kills, how many of them hit a trajectory in progress, and the population's report."""
    populating = asyncio.create_task(_populate(tokens, teacher.address, queue_path))
    kills = with_work = 0
    async with TeacherClient(teacher.address, TOKEN) as client:
        while kills < most and not populating.done():
            serving = asyncio.create_task(client.wait_until_serving(120))
            await asyncio.wait({serving, populating}, return_when=asyncio.FIRST_COMPLETED)
            if populating.done():
                serving.cancel()
                break
            await asyncio.sleep(chance.uniform(0, 0.6))
            if populating.done():
                break
            with_work += await asyncio.to_thread(_has_claims, queue_path)
            teacher.kill()
            kills += 1
            teacher.start()
        return kills, with_work, await populating


def _has_claims(queue_path: Path) -> bool:
    with closing(sqlite3.connect(queue_path, timeout=30)) as database:
        made = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'items'").fetchone()[0] > 0
        if not made:  # the population has not opened its queue yet
            return False
        return database.execute("SELECT count(*) FROM items WHERE state = 'claimed'").fetchone()[0] > 0


def main() -> None:
    """Run the experiment from the command line with a tiny model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--trajectories", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from tiny_models import write_models

    with tempfile.TemporaryDirectory() as folder:
        model = write_models(Path(folder) / "models")["qwen3_moe"]
        verdict = run(
            model,
            Path(folder),
            kills=options.kills,
            trajectories=options.trajectories,
            num_tokens=options.tokens,
            seed=options.seed,
        )
    sys.stdout.write(json.dumps(asdict(verdict), indent=2) + "\n")
    sys.exit(not verdict.is_clean)


if __name__ == "__main__":
    main()
