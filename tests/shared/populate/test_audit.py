"""Compare cached rows with a live teacher's: the figures by hand, and which positions are scored again."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from cache_rows import IDENTITY, TEMPERATURES, TOKENS, random_rows
from data_identity import data_identity
from numpy.typing import NDArray

from hyperagent.cache.local import LocalCache
from hyperagent.data.files.tokens_file import TRAIN, TokenizedTrajectory, write_tokens
from hyperagent.populate.audit import audit, compare
from hyperagent.topk import TopKRows
from hyperagent.wire.client import TeacherClient, TeacherFacts


def rows(ids: list[list[int]], probabilities: list[list[float]], target_logprob: list[float]) -> TopKRows:
    n = len(ids)
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array(probabilities)).astype(np.float32)
    return TopKRows(
        positions=np.arange(1, n + 1, dtype=np.uint32),
        ids=np.array(ids, np.uint32),
        logprobs=logprobs,
        tail_logmass=np.full(n, log(0.1), np.float32),
        target_logprob=np.array(target_logprob, np.float32),
        tail_logsumexps=np.zeros((n, len(TEMPERATURES)), np.float32),
    )


def test_the_report_counts_shared_ids_and_puts_the_rest_into_one_bucket() -> None:
    # The second row keeps two ids; its padding repeats the first and is not compared.
    cached = rows([[1, 2, 3], [5, 6, 5]], [[0.5, 0.3, 0.1], [0.6, 0.3, 0.0]], [-1.0, -2.0])
    live = rows([[1, 4, 3], [6, 5, 7]], [[0.4, 0.3, 0.2], [0.5, 0.2, 0.1]], [-1.25, -1.0])
    report = compare([(cached, live)])

    assert (report.positions, report.trajectories) == (2, 1)
    assert report.top_k_overlap == pytest.approx(4 / 5)
    first = 0.5 * log(0.5 / 0.4) + 0.1 * log(0.1 / 0.2) + 0.4 * log(0.4 / 0.4)
    second = 0.6 * log(0.6 / 0.2) + 0.3 * log(0.3 / 0.5) + 0.1 * log(0.1 / 0.3)
    assert report.kl_nats.mean == pytest.approx((first + second) / 2, rel=1e-5)
    assert report.kl_nats.max == pytest.approx(second, rel=1e-5)
    assert report.kl_nats.p99 == pytest.approx(first + 0.99 * (second - first), rel=1e-5)
    assert report.logprob_difference.max == pytest.approx(log(3), rel=1e-5)
    assert report.logprob_difference.mean == pytest.approx((log(1.25) + log(2) + log(3) + log(5 / 3)) / 4, rel=1e-5)
    assert (report.target_difference.mean, report.target_difference.max) == (0.625, 1.0)


@dataclass
class EchoingTeacher:
    """Answers with the rows that the cache was filled with, and keeps the positions it was asked for."""

    known: dict[bytes, TopKRows]
    address: str = "a test"
    asked: dict[bytes, list[int]] = field(default_factory=dict)

    async def get_teacher(self) -> TeacherFacts:
        return TeacherFacts(IDENTITY, max_tokens=100, max_pending_requests=1)

    async def score_tokens(
        self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], **_: Any
    ) -> AsyncGenerator[TopKRows, None]:
        self.asked[token_ids.tobytes()] = positions.tolist()
        whole = self.known[token_ids.tobytes()]
        yield whole.at(np.searchsorted(whole.positions, positions))


async def asked_positions(root: Path, num_positions: int, seed: int) -> list[list[int]]:
    """Audit a cache of two trajectories, of 3 and 17 rows; return the positions asked for, by trajectory."""
    root.mkdir()
    known = {}
    with (
        LocalCache.create_or_open(root / "cache", IDENTITY) as cache,
        write_tokens(root / "tokens.parquet", data_identity(IDENTITY.tokenizer)) as writer,
    ):
        for number, num_rows in enumerate((3, 17)):
            ids, given = TOKENS + number, random_rows(num_rows, 8, seed=number)
            cache.put(ids, given)
            known[ids.tobytes()] = given
            writer.write(
                TokenizedTrajectory(
                    f"t{number}",
                    "r",
                    TRAIN,
                    token_ids=ids,
                    positions=given.positions,
                    prompt_ids=ids[:1],
                    student_ids=ids,
                    student_positions=given.positions,
                )
            )
    teacher = EchoingTeacher(known)
    with LocalCache.open(root / "cache") as cache:
        report = await audit(
            cache, root / "tokens.parquet", cast(TeacherClient, teacher), num_positions=num_positions, seed=seed
        )
    asked = [teacher.asked.get(ids, []) for ids in known]
    assert report.positions == sum(map(len, asked))
    assert report.top_k_overlap == 1
    # The cache's codec rounds log-probabilities.
    assert report.logprob_difference.max < 0.1
    for positions, given in zip(asked, known.values(), strict=True):
        assert set(positions) <= set(given.positions.tolist())
        assert positions == sorted(set(positions))
    return asked


async def test_as_many_random_positions_as_asked_for_are_scored_and_never_more_than_there_are(tmp_path: Path) -> None:
    whole = await asked_positions(tmp_path / "whole", 1000, 0)
    assert [len(positions) for positions in whole] == [3, 17]
    some = [await asked_positions(tmp_path / f"seed-{seed}", 8, seed) for seed in (0, 1)]
    assert [sum(map(len, one)) for one in some] == [8, 8]
    assert some[0] != some[1]
    assert some[0] == await asked_positions(tmp_path / "again", 8, 0)
