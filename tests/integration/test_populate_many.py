"""Tests of several teachers and populations on one queue, of a different teacher, and of drift detection."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from world import Run, Start, World

from hyperagent.cache.local import LocalCache
from hyperagent.data.files.tokens_file import count_tokens_rows, read_tokens
from hyperagent.topk import TopKRows

OPTIONS = ["--top-k", "16", "--max-tokens", "4096"]


def serve(start: Start, run: Run, model: Path, cache: Path, port: int) -> str:
    start("serve", "teacher", "--model", model, "--cache", cache, "--port", port, *OPTIONS)
    assert run("wait", "teacher", "--address", f"127.0.0.1:{port}").returncode == 0
    return f"127.0.0.1:{port}"


def test_two_teachers_and_two_populations_share_a_queue_in_redis(
    world: World, run: Run, start: Start, free_port: Callable[[], int], redis_server: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first, second = (serve(start, run, world.teacher, cache, free_port()) for _ in range(2))
    other = start("cache", "populate", world.tokens, "--teacher", first, "--queue", redis_server.url)
    done = run(
        "cache",
        "populate",
        world.tokens,
        "--teacher",
        second,
        "--teacher",
        first,
        "--queue",
        redis_server.url,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert other.wait(120) == 0
    report = json.loads(done.stdout)
    total = count_tokens_rows(world.tokens)
    assert report["written"] + report["present"] == total
    verified = json.loads(run("cache", "verify", cache, "--json").stdout)
    assert (verified["trajectories"], verified["digest"]) == (total, report["digest"])


def at_temperature(rows: TopKRows, temperature: float) -> TopKRows:
    """Return the rows of a less confident teacher."""
    flat, tail = rows.logprobs / temperature, rows.tail_logmass / temperature
    total = np.logaddexp(np.logaddexp.reduce(flat, axis=1), tail)
    return replace(
        rows,
        logprobs=(flat - total[:, None]).astype(np.float32),
        tail_logmass=(tail - total).astype(np.float32),
        # As if the whole tail were on one id.
        tail_logsumexps=((tail - total)[:, None] / 2).astype(np.float32),
    )


def test_teachers_that_differ_are_refused_and_a_drift_is_found(
    world: World, run: Run, start: Start, free_port: Callable[[], int], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    address = serve(start, run, world.teacher, cache, free_port())
    stranger = serve(start, run, world.student, tmp_path / "other", free_port())
    refused = run("cache", "populate", world.tokens, "--teacher", address, "--teacher", stranger)
    assert refused.returncode == 1
    assert f"the teacher at {stranger} does not match" in refused.stderr.splitlines()[-1]
    assert not list(cache.glob("shards/*"))

    assert run("cache", "populate", world.tokens, "--teacher", address).returncode == 0
    with LocalCache.open(cache) as opened, LocalCache.create_or_open(tmp_path / "bent", opened.identity) as bent:
        for trajectory in read_tokens(world.tokens):
            rows = opened.get(opened.key(trajectory.token_ids, trajectory.positions)).rows
            bent.put(trajectory.token_ids, at_temperature(rows, 2.0))
    drifted = run("cache", "audit", tmp_path / "bent", world.tokens, "--teacher", address, "-n", "8", "--json")
    assert drifted.returncode == 1
    assert json.loads(drifted.stdout)["kl_nats"]["mean"] > 1e-3
    sound = run("cache", "audit", cache, world.tokens, "--teacher", address, "-n", "8", "--json")
    assert sound.returncode == 0, sound.stderr
    wrong = run("cache", "audit", cache, world.tokens, "--teacher", stranger)
    assert wrong.returncode == 1
    assert "does not match" in wrong.stderr.splitlines()[-1]
