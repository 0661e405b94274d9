"""Test the order of batches, the split of a step over ranks, and predicted costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_student import real_config, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

from hyperagent_trainer.data.cost import StepCost
from hyperagent_trainer.data.schedule import batch_order, batches_from, plan_step

costs_of_a_step = st.lists(st.floats(1, 1e6), min_size=1, max_size=12)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 9))
def test_every_trajectory_occurs_once_an_epoch(lengths: list[int], batch_size: int, seed: int) -> None:
    batches = batch_order(lengths, batch_size=batch_size, seed=seed, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert max(len(batch) for batch in batches) <= batch_size


def test_epochs_differ_and_seeds_decide() -> None:
    lengths = list(range(1, 41))
    first = batch_order(lengths, batch_size=4, seed=0, epoch=0)
    assert first == batch_order(lengths, batch_size=4, seed=0, epoch=0)
    assert first != batch_order(lengths, batch_size=4, seed=0, epoch=1)
    assert first != batch_order(lengths, batch_size=4, seed=1, epoch=0)


def test_a_later_start_sees_what_it_would_have_seen() -> None:
    lengths = list(range(1, 12))
    whole = batches_from(lengths, batch_size=3, seed=0, first_step=0)
    expected = [next(whole) for _ in range(12)][7:]
    later = batches_from(lengths, batch_size=3, seed=0, first_step=7)
    assert [next(later) for _ in range(5)] == expected


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 9), st.floats(0.01, 1))
def test_every_trajectory_occurs_once_in_one_of_its_views(num: int, batch_size: int, seed: int, share: float) -> None:
    lengths = list(range(1, 2 * num + 1))
    batches = batch_order(lengths, batch_size=batch_size, seed=seed, epoch=0, full_view_share=share)
    assert sorted(i % num for batch in batches for i in batch) == list(range(num))
    if share == 1:
        assert all(i >= num for batch in batches for i in batch)


def test_the_share_of_full_views_is_kept_and_falls_on_others_each_epoch() -> None:
    lengths = [10] * 4000
    full = [
        {
            i
            for batch in batch_order(lengths, batch_size=8, seed=0, epoch=e, full_view_share=0.3)
            for i in batch
            if i >= 2000
        }
        for e in (0, 1)
    ]
    assert all(540 <= len(samples) <= 660 for samples in full)
    assert len(full[0] & full[1]) < 250


@given(costs_of_a_step, st.integers(1, 9), st.integers(1, 4))
def test_every_trajectory_counts_once_and_all_ranks_pass_equally_often(
    costs: list[float], num_ranks: int, size: int
) -> None:
    step = list(range(len(costs)))
    plans = [plan_step(step, costs, rank=rank, num_ranks=num_ranks, size=size) for rank in range(num_ranks)]
    counted = [i for plan in plans for micro in plan.micro_batches if not micro.is_dummy for i in micro.indices]
    assert sorted(counted) == step
    assert len({len(plan.micro_batches) for plan in plans}) == 1
    assert all(1 <= len(micro.indices) <= size for plan in plans for micro in plan.micro_batches)
    loads = [sum(costs[i] for m in plan.micro_batches if not m.is_dummy for i in m.indices) for plan in plans]
    assert all(plan.indices == tuple(step) for plan in plans)
    assert all(plan.efficiency == pytest.approx(np.mean(loads) / max(loads)) for plan in plans)
    # Graham's bound for any list scheduling.
    assert max(loads) <= 2 * max(max(costs), sum(costs) / num_ranks)


def test_long_trajectories_are_spread_and_short_ones_fill_up() -> None:
    costs = [10.0, 6.0, 5.0, 1.0]
    plans = [plan_step([0, 1, 2, 3], costs, rank=rank, num_ranks=2, size=1) for rank in (0, 1)]
    assert [[m.indices for m in plan.micro_batches] for plan in plans] == [[(0,), (3,)], [(1,), (2,)]]
    assert plans[0].efficiency == 1


def test_steps_of_eight_keep_eight_ranks_busy() -> None:
    """The lengths are lognormal with mean 45,000 and a coefficient of variation of 0.8; the student is Qwen3-Next."""
    lengths = (
        np.random.default_rng(0).lognormal(np.log(45_000) - 0.25, 0.7, 8_192).clip(1_000, 131_072).astype(int).tolist()
    )
    cost = StepCost(per_token=1.95e10, per_token_squared=4.4e5)
    costs = [cost(n) for n in lengths]

    def efficiency(steps: list[list[int]]) -> float:
        loads = [[costs[i] for i in step] for step in steps]
        return float(sum(map(np.mean, loads)) / sum(map(max, loads)))

    order = batches_from(lengths, batch_size=8, seed=0, first_step=0)
    assert efficiency([next(order) for _ in range(1024)]) > 0.95
    shuffled = np.random.default_rng(1).permutation(8_192).reshape(-1, 8).tolist()
    assert efficiency(shuffled) < 0.55


def decoder_cost(config: PreTrainedConfig) -> StepCost:
    with torch.device("meta"):
        return StepCost.of(AutoModelForCausalLM.from_config(config).get_decoder(), config)


def test_the_cost_of_the_80b_student_is_that_of_its_active_parameters() -> None:
    # 3.252e9 active parameters in the layers' products, 36 layers of Gated DeltaNet and twelve of attention.
    cost = decoder_cost(real_config())
    assert cost.per_token == pytest.approx(3 * 2 * 3.252e9 + 4.5 * 0.208e9, rel=2e-3)
    assert cost.per_token_squared == pytest.approx(4.5 * 2 * 4096 * 12)


def test_the_cost_of_a_dense_student_is_what_torch_counts() -> None:
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, attn_implementation="eager",
    )  # fmt: skip
    cost, model = decoder_cost(config), AutoModelForCausalLM.from_config(config).get_decoder()
    for num_tokens in (64, 256):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False)
        # Eager attention computes every pair, of which half are needed. The remaining products are the rotary tables.
        forward = cost.per_token / 3 * num_tokens + 2 * cost.per_token_squared / 4.5 * num_tokens**2
        assert counter.get_total_flops() == pytest.approx(forward, rel=0.01)


def test_a_linear_layer_adds_nothing_quadratic() -> None:
    config = tiny_config()
    assert decoder_cost(config).per_token_squared == pytest.approx(4.5 * 2 * 2 * 32 * 1)
