"""Tests of `hyperagent cache` for people and scripts, on an existing cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import Run, World, one_line

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.local import LocalCache
from hyperagent.data.files.tokens_file import read_data_identity, read_tokens
from hyperagent.identity import TeacherIdentity
from hyperagent.topk import TopKRows

TOP_K = 4
VOCABULARY = 151_936


def uniform_rows(positions: np.ndarray) -> TopKRows:
    """Return rows with ids 0 to 3, each with probability 0.2."""
    shape = (len(positions), TOP_K)
    return TopKRows(
        positions=positions,
        ids=np.broadcast_to(np.arange(TOP_K, dtype=np.uint32), shape),
        logprobs=np.full(shape, np.log(0.2), np.float32),
        tail_logmass=np.full(shape[0], np.log(0.2), np.float32),
        target_logprob=np.full(shape[0], np.log(0.2), np.float32),
        tail_logsumexps=np.empty((shape[0], 0), np.float32),
    )


@pytest.fixture
def filled(world: World, tmp_path: Path) -> dict[str, int]:
    """Fill `cache` with the trajectories of the world's tokens and one more; return supervised tokens by key."""
    identity = TeacherIdentity("t", "0" * 64, "float32", "x", "1" * 64, "2" * 64, VOCABULARY, TOP_K)
    rows: dict[str, int] = {}
    with LocalCache.create_or_open(tmp_path / "cache", identity, settings=CacheSettings(codec="exact")) as cache:
        cache.record_data(read_data_identity(world.tokens))
        for trajectory in read_tokens(world.tokens):
            key = cache.put(trajectory.token_ids, uniform_rows(trajectory.positions))
            rows[key] = len(trajectory.positions)
        strange = np.array([1, 2], np.uint32)
        rows[cache.put(np.arange(3, dtype=np.uint32), uniform_rows(strange))] = 2
    return rows


def as_json(run: Run, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    done = run("cache", *arguments, "--json")
    assert done.returncode == code, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_listing_counting_and_planning(world: World, run: Run, filled: dict[str, int]) -> None:
    listed = as_json(run, "ls", "cache")["trajectories"]
    assert {one["key"]: one["supervised_tokens"] for one in listed} == filled
    text = run("cache", "ls", "cache").stdout
    assert all(key in text for key in filled)

    stats = as_json(run, "stats", "cache")
    assert (stats["trajectories"], stats["codec"], stats["top_k"]) == (len(filled), "exact", TOP_K)
    assert stats["kept_mass"] == pytest.approx(0.8, abs=1e-6)
    # All log-probabilities of a row are rounded equally, but the tail is not: float16 is off by 2e-4 here.
    assert 0 < stats["kl_nats"] < 1e-7

    plan = as_json(run, "plan", world.tokens)
    assert plan["supervised_tokens"] == sum(filled.values()) - 2
    # Ids, log-probabilities, the tail at 1 and at the one other temperature, the target.
    assert plan["bytes_per_token"]["exact"] == 128 * 6 + 3 * 4
    assert plan["bytes"]["archive"] < plan["bytes"]["compact"] < plan["bytes"]["exact"]


def test_what_no_file_names_is_collected_and_damage_repaired(
    world: World, run: Run, filled: dict[str, int], tmp_path: Path
) -> None:
    assert as_json(run, "gc", "cache")["trajectories_removed"] == 0
    collected = as_json(run, "gc", "cache", "--keep", world.tokens)
    assert (collected["trajectories_removed"], collected["bytes_freed"] > 0) == (1, True)
    assert as_json(run, "compact", "cache")["bytes_freed"] == 0
    assert as_json(run, "verify", "cache")["trajectories"] == len(filled) - 1
    with LocalCache.open(tmp_path / "cache"):
        assert "has it open" in one_line(run("cache", "gc", "cache"))

    (shard,) = (tmp_path / "cache" / "shards").glob("*.shard")
    content = bytearray(shard.read_bytes())
    content[64 + 100] ^= 1  # In the payload of the first record.
    shard.write_bytes(content)
    damaged = run("cache", "verify", "cache")
    assert damaged.returncode == 1
    assert shard.name in damaged.stdout + damaged.stderr
    repaired = as_json(run, "repair", "cache", code=1)
    assert len(repaired["to_populate"]) >= 1
    assert as_json(run, "verify", "cache")["trajectories"] == len(filled) - 1 - len(repaired["to_populate"])


def test_rows_go_out_and_come_back(world: World, run: Run, filled: dict[str, int], tmp_path: Path) -> None:
    exported = as_json(run, "export", "cache", world.tokens, "--out", "out", "--format", "npz")
    assert exported["supervised_tokens"] == sum(filled.values()) - 2
    assert len(list((tmp_path / "out").glob("*.npz"))) == len(filled) - 1
    assert as_json(run, "import", "out", "back", "--codec", "exact")["trajectories"] == len(filled) - 1
    assert as_json(run, "stats", "back")["supervised_tokens"] == sum(filled.values()) - 2
    assert as_json(run, "import", "cache", "back") == {"trajectories": len(filled), "already_there": len(filled) - 1}
    assert as_json(run, "verify", "back")["digest"] == as_json(run, "verify", "cache")["digest"]

    assert as_json(run, "import", "cache", "smaller", "--codec", "compact")["already_there"] == 0
    assert as_json(run, "stats", "smaller")["codec"] == "compact"
    assert "would be rounded again" in one_line(run("cache", "import", "smaller", "back"))
    assert "neither a cache nor an export" in one_line(run("cache", "import", "nowhere", "back"))
