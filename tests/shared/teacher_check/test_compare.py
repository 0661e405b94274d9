"""The teacher check on caches written by the project's own writer, with teachers whose dependence is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from hyperagent.cache.format.manifest import CacheSettings
from hyperagent.cache.local import LocalCache
from hyperagent.cli.main import build_app
from hyperagent.data.files.checked_sample import SampleSettings, sample_identity
from hyperagent.data.files.tokens_file import (
    HELD_OUT,
    TokenizedTrajectory,
    read_data_identity,
    read_tokens,
    write_tokens,
)
from hyperagent.errors import DataError, HyperagentError, IdentityMismatch
from hyperagent.identity import DataIdentity, TeacherIdentity, TokenizerIdentity
from hyperagent.teacher_check.compare import ComparedTrajectory, compare_caches
from hyperagent.teacher_check.dependent_rows import read_dependent_rows, write_dependent_rows
from hyperagent.teacher_check.verdict import check_teacher, dependent_rows
from hyperagent.topk import TopKRows

VOCAB = 16
TEACHER = TeacherIdentity(
    model="t", weights="1" * 64, dtype="float32", backend="x", tokenizer_sha256="2" * 64, template_sha256="3" * 64,
    vocab_size=VOCAB, top_k=VOCAB,
)  # fmt: skip
DATA = DataIdentity(TokenizerIdentity("2" * 64, "3" * 64), "0" * 64, {"views": {"condition": ["task"]}})

Logits = Callable[[NDArray[np.uint32], int], NDArray[np.float64]]
"""Function of a trajectory's tokens and a position to the teacher's logits [V]."""


def ignoring(tokens: NDArray[np.uint32], position: int) -> NDArray[np.float64]:
    """Depend on the token before alone, never on the condition, which is the first token."""
    return np.sin(np.arange(VOCAB) * (1.0 + float(tokens[position - 1])))


def using(tokens: NDArray[np.uint32], position: int) -> NDArray[np.float64]:
    """Expect, at every fifth position, the token that the condition names."""
    logits = ignoring(tokens, position)
    if position % 5 == 0:
        logits[int(tokens[0])] += 4.0
    return logits


@dataclass
class World:
    """Two tokens files of the same trajectories, and a folder for the caches."""

    folder: Path
    tokens: Path
    foreign: Path

    def populate(self, name: str, tokens: Path, logits: Logits, teacher: TeacherIdentity = TEACHER) -> Path:
        root = self.folder / name
        settings = CacheSettings(codec="exact")
        with LocalCache.create_or_open(root, teacher, settings=settings) as cache:
            for trajectory in read_tokens(tokens):
                cache.put(trajectory.token_ids, rows_of(trajectory, logits, teacher.top_k))
        return root

    def compare(self, logits: Logits) -> list[ComparedTrajectory]:
        own, foreign = self.populate("own", self.tokens, logits), self.populate("foreign", self.foreign, logits)
        return compare_caches(self.tokens, own, self.foreign, foreign)


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def rows_of(trajectory: TokenizedTrajectory, logits: Logits, top_k: int) -> TopKRows:
    tokens = trajectory.token_ids
    logp = np.stack([log_softmax(logits(tokens, int(position))) for position in trajectory.positions])
    # As the cache stores them: float32 ties are ordered by id.
    logp32 = logp.astype(np.float32)
    ids = np.argsort(-logp32, axis=1, kind="stable")
    rest = np.exp(np.take_along_axis(logp, ids[:, top_k:], axis=1)).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(rest).astype(np.float32)
    return TopKRows(
        positions=trajectory.positions,
        ids=ids[:, :top_k].astype(np.uint32),
        logprobs=np.take_along_axis(logp32, ids[:, :top_k], axis=1),
        tail_logmass=tail,
        target_logprob=logp32[np.arange(len(logp)), tokens[trajectory.positions]],
        tail_logsumexps=np.zeros((len(logp), 0), np.float32),
    )


def trajectories(*, foreign: bool) -> list[TokenizedTrajectory]:
    """Return six trajectories whose first token is the condition, and their position's fifth the token it names."""
    made = []
    for number in range(6):
        tokens = np.random.default_rng(number).integers(0, VOCAB, 41 + 10 * number).astype(np.uint32)
        tokens[5::5] = number
        tokens[0] = (number + 1) % 6 if foreign else number
        positions = np.arange(3, len(tokens), dtype=np.uint32)
        made.append(
            TokenizedTrajectory(
                f"t{number}", f"a/{number // 2}", HELD_OUT, tokens, positions, tokens[:1], tokens[1:], positions - 1
            )
        )
    return made


def write(path: Path, made: list[TokenizedTrajectory], identity: DataIdentity) -> Path:
    with write_tokens(path, identity) as writer:
        for trajectory in made:
            writer.write(trajectory)
    return path


FOREIGN = sample_identity(DATA, SampleSettings(64, 0, HELD_OUT), condition="foreign")


@pytest.fixture
def world(tmp_path: Path) -> World:
    unused = replace(trajectories(foreign=False)[0], trajectory_id="in no sample", split="train")
    return World(
        tmp_path,
        write(tmp_path / "tokens.parquet", [unused, *trajectories(foreign=False)], DATA),
        write(tmp_path / "foreign.parquet", trajectories(foreign=True), FOREIGN),
    )


def expected_kl(own: TokenizedTrajectory, foreign: TokenizedTrajectory, logits: Logits) -> NDArray[np.float64]:
    pairs = [
        (log_softmax(logits(own.token_ids, int(p))), log_softmax(logits(foreign.token_ids, int(p))))
        for p in own.positions
    ]
    return np.array([(np.exp(p) * (p - q)).sum() for p, q in pairs])


def test_a_teacher_that_ignores_the_condition_has_nothing_to_distill(world: World) -> None:
    check = check_teacher(world.compare(ignoring))
    assert check.nothing_to_distill
    assert check.verdict.startswith("nothing to distill here: only 0.0% of the rows depend on the condition")
    assert (check.all_rows.kl, check.all_rows.dependent_share) == (0, 0)
    assert check.all_rows.own_nll == check.all_rows.foreign_nll


def test_a_teacher_that_uses_the_condition_is_measured_exactly(world: World) -> None:
    compared = world.compare(using)
    pairs = list(zip(trajectories(foreign=False), trajectories(foreign=True), strict=True))
    assert [found.trajectory_id for found in compared] == [own.trajectory_id for own, _ in pairs]
    for found, (own, foreign) in zip(compared, pairs, strict=True):
        # float16 log-probabilities in the cache.
        assert found.kl_N == pytest.approx(expected_kl(own, foreign, using), abs=5e-3)
        nll = [-log_softmax(using(own.token_ids, int(p)))[own.token_ids[p]] for p in own.positions]
        assert found.own_nll_N == pytest.approx(nll, abs=1e-5)

    check = check_teacher(compared)
    is_fifth = np.concatenate([own.positions % 5 == 0 for own, _ in pairs])
    assert check.all_rows.dependent_share == is_fifth.mean()
    assert check.all_rows.num_rows == len(is_fifth)
    assert check.all_rows.foreign_nll > check.all_rows.own_nll + 0.1
    assert not check.nothing_to_distill
    assert check.verdict.startswith(f"the teacher uses the condition: {is_fifth.mean():.1%} of the rows")
    assert (check.num_trajectories, check.num_unchanged) == (6, 0)

    assert list(check.repositories) == ["a/0", "a/1", "a/2"]
    second = np.concatenate([expected_kl(own, foreign, using) for own, foreign in pairs if own.repo == "a/1"])
    assert check.repositories["a/1"].kl == pytest.approx(second.mean(), abs=2e-3)
    assert check.repositories["a/1"].num_rows == len(second)
    for name, rows in dependent_rows(compared).items():
        assert rows.tolist() == (pairs[int(name[1:])][0].positions % 5 == 0).tolist()


def test_fewer_kept_ids_give_a_lower_bound(world: World) -> None:
    found = []
    for top_k in (3, 6, 12):
        few = replace(TEACHER, top_k=top_k)
        own, foreign = (
            world.populate(f"{file.stem}{top_k}", file, using, few) for file in (world.tokens, world.foreign)
        )
        found.append(check_teacher(compare_caches(world.tokens, own, world.foreign, foreign)).all_rows.kl)
    whole = check_teacher(world.compare(using)).all_rows.kl
    assert 0.3 * whole < found[0] < found[1] < found[2] < whole


def test_threshold_and_least_share_decide(world: World) -> None:
    compared = world.compare(using)
    share = check_teacher(compared).all_rows.dependent_share
    assert check_teacher(compared, least_dependent_share=share + 1e-9).nothing_to_distill
    assert not check_teacher(compared, least_dependent_share=share).nothing_to_distill
    high = max(found.kl_N.max() for found in compared)
    assert check_teacher(compared, threshold=high).all_rows.dependent_share == 0
    assert sum(rows.sum() for rows in dependent_rows(compared, threshold=high - 1e-9).values()) >= 1


def test_rows_that_change_without_predicting_better_are_called_so(world: World) -> None:
    def misled(tokens: NDArray[np.uint32], position: int) -> NDArray[np.float64]:
        logits = using(tokens, position)
        if position % 5 == 0:
            logits[int(tokens[0])] -= 8.0
        return logits

    check = check_teacher(world.compare(misled))
    assert not check.nothing_to_distill
    assert check.verdict.startswith("the teacher's rows change with the condition but do not improve")


def test_an_unchanged_condition_is_counted(world: World) -> None:
    made = trajectories(foreign=True)
    made[2] = trajectories(foreign=False)[2]
    write(world.foreign, made, FOREIGN)
    compared = world.compare(using)
    assert [found.is_unchanged for found in compared] == [number == 2 for number in range(6)]
    assert compared[2].kl_N.max() == 0
    assert check_teacher(compared).num_unchanged == 1


def test_one_cache_may_hold_both_conditions(world: World) -> None:
    separate = world.compare(using)
    world.populate("own", world.foreign, using)
    both = world.folder / "own"
    for found, again in zip(separate, compare_caches(world.tokens, both, world.foreign, both), strict=True):
        assert np.array_equal(found.kl_N, again.kl_N)


@pytest.mark.parametrize("change", ["another token", "one row less", "another name"])
def test_files_that_do_not_pair_are_refused_by_name(world: World, change: str) -> None:
    world.compare(using)
    made = trajectories(foreign=True)
    if change == "another token":
        tokens = made[3].token_ids.copy()
        tokens[7] += 1
        made[3] = replace(made[3], token_ids=tokens, student_ids=tokens[1:])
    elif change == "one row less":
        made[3] = replace(made[3], positions=made[3].positions[:-1], student_positions=made[3].student_positions[:-1])
    else:
        made[3] = replace(made[3], trajectory_id="t33")
    write(world.foreign, made, FOREIGN)
    wanted = "'t33' of .* is not in" if change == "another name" else "'t3' has other supervised tokens"
    with pytest.raises(DataError, match=wanted):
        compare_caches(world.tokens, world.folder / "own", world.foreign, world.folder / "foreign")


def test_a_cache_without_the_rows_is_refused_by_the_trajectory_s_name(world: World) -> None:
    own = world.populate("own", world.tokens, using)
    with pytest.raises(DataError, match=r"has no rows of trajectory 't0'; populate it with .*foreign.parquet"):
        compare_caches(world.tokens, own, world.foreign, own)


def test_caches_of_two_teachers_and_files_of_other_data_are_refused(world: World) -> None:
    own = world.populate("own", world.tokens, using)
    other = world.populate("other", world.foreign, using, replace(TEACHER, weights="9" * 64))
    with pytest.raises(IdentityMismatch, match="populate both caches with the same teacher"):
        compare_caches(world.tokens, own, world.foreign, other)
    with pytest.raises(IdentityMismatch, match="not under the foreign one"):
        compare_caches(world.tokens, own, world.tokens, own)
    stray = sample_identity(replace(DATA, source="8" * 64), SampleSettings(64, 0, HELD_OUT), condition="foreign")
    write(world.foreign, trajectories(foreign=True), stray)
    with pytest.raises(IdentityMismatch, match="the foreign tokens file was made from tokens"):
        compare_caches(world.tokens, own, world.foreign, own)


def test_a_foreign_file_without_trajectories_is_refused(world: World) -> None:
    write(world.foreign, [], FOREIGN)
    with pytest.raises(DataError, match="holds no trajectory"):
        check_teacher(world.compare(using))


def test_dependent_rows_are_read_as_written(tmp_path: Path, flip_byte: Callable[[Path, int], None]) -> None:
    path = tmp_path / "dependent.parquet"
    rows = {"t1": np.array([True, False, True]), "t0": np.array([False]), "é": np.zeros(300, bool)}
    write_dependent_rows(path, rows, data=FOREIGN, threshold=0.1)
    found = read_dependent_rows(path, data=DATA)
    assert list(found) == list(rows)
    for name, row in rows.items():
        assert found[name].dtype == np.bool_
        assert np.array_equal(found[name], row)
    with pytest.raises(IdentityMismatch, match="run the teacher check on this tokens file"):
        read_dependent_rows(path, data=replace(DATA, source="8" * 64))
    with pytest.raises(DataError, match="there is no file"):
        read_dependent_rows(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="does not hold dependent rows"):
        read_dependent_rows(write(tmp_path / "tokens.parquet", trajectories(foreign=False), DATA))
    flip_byte(path, 30)
    with pytest.raises(DataError, match="is damaged"):
        read_dependent_rows(path)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), ["teacher-check", "compare", *map(str, arguments)])


def test_the_command_prints_the_figures_and_exits_with_1_if_there_is_nothing_to_distill(world: World) -> None:
    out = world.folder / "dependent.parquet"
    codes = {}
    for name, logits in (("using", using), ("ignoring", ignoring)):
        caches = [world.populate(f"{name}-{tokens.stem}", tokens, logits) for tokens in (world.tokens, world.foreign)]
        files = ("--tokens", world.tokens, "--cache", caches[0], "--foreign-tokens", world.foreign)
        done = run(*files, "--foreign-cache", caches[1], "--out", out, "--json")
        result = json.loads(done.stdout)
        codes[name] = done.exit_code, result["nothing_to_distill"]
        expected = check_teacher(compare_caches(world.tokens, caches[0], world.foreign, caches[1]))
        assert result == expected.to_json()
        rows = read_dependent_rows(out, data=read_data_identity(world.tokens))
        assert sum(map(np.sum, rows.values())) == round(result["dependent_share"] * result["num_rows"])
        assert expected.verdict in run(*files, "--foreign-cache", caches[1]).stdout
        assert run(*files, "--foreign-cache", caches[1], "--least-share", 0).exit_code == 0
    assert codes == {"using": (0, False), "ignoring": (1, True)}
    missing = run(*files, "--foreign-cache", world.folder / "none")
    assert isinstance(missing.exception, HyperagentError)
