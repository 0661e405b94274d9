"""Fill the cache: serve the teacher, let it score the tokens over gRPC, and verify every record."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.stats import CacheStats, count
from hyperagent.cache.maintenance.verify import verify
from hyperagent.data.files.tokens_file import count_tokens_rows, read_data_identity, read_tokens
from hyperagent.errors import DataError
from hyperagent.wire.client import TeacherClient
from hyperagent.wire.outcome import Outcome
from hyperagent_demo.config import DemoConfig
from hyperagent_demo.processes import free_port, service
from hyperagent_demo.stages import Bar


def populate(
    config: DemoConfig, teacher: Path, *, tokens: Path, cache: Path, log: Path, token: str, bar: Bar
) -> CacheStats:
    """Populate the folder `cache` with the teacher's rows of a tokens file, and return its statistics.

    Args:
        teacher: folder of the teacher's model.
        log: file for the teacher's log.
        token: access token for the teacher service.

    Raises:
        DataError: the teacher refuses a trajectory, or a record is damaged.
        ServiceError: the service has ended or is not ready in time.
    """
    port = free_port()
    arguments = ["--model", str(teacher), "--cache", str(cache), "--port", str(port)]
    arguments += ["--top-k", str(config.top_k), "--max-tokens", str(config.views.max_tokens)]
    address = f"127.0.0.1:{port}"
    with service("teacher", arguments, log=log, token=token) as process:
        process.wait_until_ready(lambda timeout_s: asyncio.run(_wait_until_serving(address, token, timeout_s)))
        asyncio.run(_populate_over_grpc(address, tokens, token, bar))
    with LocalCache.open(cache) as opened:
        if damaged := verify(opened).damaged:
            raise DataError(f"{len(damaged)} records of the cache are damaged, the first is {damaged[0]}")
        return count(opened)


async def _wait_until_serving(address: str, token: str, timeout_s: float) -> None:
    async with TeacherClient(address, token) as teacher:
        await teacher.wait_until_serving(timeout_s)


async def _populate_over_grpc(address: str, tokens: Path, token: str, bar: Bar) -> None:
    async with TeacherClient(address, token) as teacher:
        total, rows = count_tokens_rows(tokens), 0
        trajectories = ((t.trajectory_id, t.token_ids, t.positions) for t in read_tokens(tokens))
        outcomes: Counter[Outcome] = Counter()
        async for item in teacher.populate(trajectories, data=read_data_identity(tokens)):
            if item.outcome is Outcome.REFUSED:
                raise DataError(f"the teacher refuses trajectory {item.trajectory_id!r}: {item.reason}")
            outcomes[item.outcome] += 1
            rows += item.num_rows
            bar.update(outcomes.total(), total, f"{rows:,} supervised tokens")
