"""Tests of the plan's arithmetic against products counted one by one, and of its standard errors by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from hyperagent.data.reports.plan import (
    QWEN3_CODER_480B,
    QWEN3_CODER_NEXT,
    STUDENT_UTILISATION,
    TEACHER_UTILISATION,
    estimate,
    plan_distillation,
)
from hyperagent.errors import ConfigError, DataError
from hyperagent.flops import ModelShape
from hyperagent.hardware import machine_named

TINY = ModelShape(
    "tiny", 1e3, linear_parameters=3 * 4 * 5, attention_width=2 * 3, num_attention_layers=2, head_parameters=4 * 7
)


def lengths(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_every_product_is_counted() -> None:
    """Count three matrices of 4 by 5 per token, two attention layers with two heads of 3, and a head of 4 by 7."""
    tokens, rows = 6, 4
    linear = sum(2 * 4 * 5 for _ in range(tokens) for _ in range(3))
    # Scores and values: a product of 3 numbers per head, layer, and pair of a token and an earlier one.
    attention = sum(2 * (2 * 3) for query in range(tokens) for key in range(query) for _ in range(2) for _ in range(2))
    # A token also attends to itself, which half of the square counts only half.
    itself = sum(2 * (2 * 3) for _ in range(tokens) for _ in range(2) for _ in range(2)) / 2
    head = sum(2 * 4 * 7 for _ in range(rows))
    counted = TINY.forward_flops(lengths(tokens), lengths(rows))
    assert counted["linear"] == linear
    assert counted["attention"] == attention + itself
    assert counted["head"] == head
    assert counted["recurrent"] == 0


@pytest.mark.parametrize(("shape", "active"), [(QWEN3_CODER_480B, 35e9), (QWEN3_CODER_NEXT, 3.25e9)])
def test_active_parameters_are_those_of_the_names(shape: ModelShape, active: float) -> None:
    """A35B includes the head and the embedding table; A3B, with the published 3B, does not."""
    tables = 2 * shape.head_parameters if shape is QWEN3_CODER_480B else 0
    assert shape.linear_parameters + tables == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize(("length", "gigaflops"), [(8_192, 24.5), (32_768, 35.4), (45_000, 40.8), (131_072, 78.8)])
def test_the_students_step_costs_what_was_found_independently(length: int, gigaflops: float) -> None:
    """Executed FLOPs per token under full recomputation, from a survey's own count of the same architecture."""
    rows = lengths(int(0.3 * length))
    plan = plan_distillation(lengths(length), rows, lengths(length), rows=1, machine=machine_named("8xh200"), epochs=1)
    assert plan.student_flops / length / 1e9 == pytest.approx(gigaflops, rel=0.01)


def test_attention_is_quadratic_and_all_else_linear() -> None:
    one, two = (QWEN3_CODER_NEXT.forward_flops(lengths(n * 1000), lengths(n * 300)) for n in (1, 2))
    assert {kind: float(two[kind][0] / one[kind][0]) for kind in one} == {
        "linear": 2,
        "attention": 4,
        "recurrent": 2,
        "head": 2,
    }


def test_hours_follow_from_flops_machine_and_epochs() -> None:
    tokens, rows = lengths(1000, 3000), lengths(300, 900)
    plan = plan_distillation(tokens, rows, lengths(900, 2900), rows=2, machine=machine_named("8xh200"), epochs=3)
    assert (plan.tokens.total, plan.supervised_tokens.total, plan.student_tokens.total) == (4000, 1200, 3800)
    assert plan.tokens.standard_error == 0
    assert plan.teacher_flops == sum(sum(QWEN3_CODER_480B.forward_flops(tokens, rows).values()))
    assert plan.teacher_gpu_hours * 3600 * 989.4e12 * TEACHER_UTILISATION == pytest.approx(plan.teacher_flops)
    assert plan.student_gpu_hours * 3600 * 989.4e12 * STUDENT_UTILISATION == pytest.approx(plan.student_flops)
    assert plan.teacher_hours == plan.teacher_gpu_hours / 8
    assert plan.student_hours == plan.student_gpu_hours / 8
    once = plan_distillation(tokens, rows, lengths(900, 2900), rows=2, machine=machine_named("8xh200"), epochs=1)
    assert plan.student_flops == pytest.approx(3 * once.student_flops)
    assert plan.teacher_flops == once.teacher_flops


def test_what_fits() -> None:
    def fits(name: str) -> bool:
        return plan_distillation(
            lengths(9), lengths(3), lengths(9), rows=1, machine=machine_named(name), epochs=1
        ).teacher_fits

    # 960 GB in bfloat16, plus a fifth of the memory free.
    assert {name: fits(name) for name in ("1xh200", "8xh100", "8xh200", "8xb200")} == {
        "1xh200": False,
        "8xh100": False,
        "8xh200": False,
        "8xb200": True,
    }


def test_the_standard_error_is_that_of_many_samples() -> None:
    generator = np.random.default_rng(0)
    everything = generator.lognormal(10, 0.6, 400)
    drawn = [estimate(generator.choice(everything, 100, replace=False), 400) for _ in range(3000)]
    totals = np.array([one.total for one in drawn])
    assert totals.mean() == pytest.approx(everything.sum(), rel=0.005)
    assert np.mean([one.standard_error for one in drawn]) == pytest.approx(totals.std(), rel=0.06)


def test_a_census_has_no_error_and_nothing_has_no_plan() -> None:
    assert estimate(np.array([1.0, 5.0]), 2).standard_error == 0
    assert estimate(np.array([1.0]), 10).total == 10
    with pytest.raises(DataError, match="the cost cannot be estimated"):
        estimate(np.array([]), 10)


def test_a_machine_is_nodes_of_gpus() -> None:
    node, nodes = machine_named("8xh200"), machine_named("4x8xh200")
    assert (node.nodes, node.gpus_per_node, node.gpus) == (1, 8, 8)
    assert (nodes.nodes, nodes.gpus_per_node, nodes.gpus) == (4, 8, 32)
    assert (nodes.memory_bytes, nodes.flops) == (node.memory_bytes, node.flops) == (141 * 10**9, 989.4e12)
    # Eight adapters of 400 Gb/s.
    assert nodes.node_link_bytes_per_s == pytest.approx(0.78 * 8 * 400e9 / 8)


@pytest.mark.parametrize("name", ["9xh900", "16xh200", "0xh200", "h200", "8xh200x2", "2x9xh100", "0x8xh200"])
def test_an_unknown_machine_is_answered_with_how_one_is_written(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"no machine is called '{name}'; write GPUSxKIND, such as 8xh200, .*4x8xh200"
    ):
        machine_named(name)
