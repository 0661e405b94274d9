"""Test the features of a prompt that a hypernetwork can read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3Config, Qwen3NextConfig

from hyperagent.errors import ConfigError
from hyperagent.model.featurizer import make_featurizer

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "intermediate_size": 64, "tie_word_embeddings": False, "initializer_range": 0.2,
}  # fmt: skip


def next_config() -> PretrainedConfig:
    return Qwen3NextConfig(
        **SHAPE, linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        full_attention_interval=4,
    )  # fmt: skip


def dense_config() -> PretrainedConfig:
    return Qwen3Config(**SHAPE)


@pytest.fixture(scope="module", params=[next_config, dense_config])
def student(request: pytest.FixtureRequest) -> PreTrainedModel:
    make: Callable[[], PretrainedConfig] = request.param
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make()).eval().requires_grad_(False)


IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def test_embeddings_are_rows_of_the_table(student: PreTrainedModel) -> None:
    features = make_featurizer("embeddings", student)
    assert torch.equal(features(IDS), student.get_input_embeddings()(IDS))
    assert features.num_ids == 96


@pytest.mark.parametrize("num_layers", [1, 3])
def test_hidden_states_are_those_after_the_first_layers(num_layers: int, student: PreTrainedModel) -> None:
    expected = student(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states[num_layers]
    features = make_featurizer(f"hidden@{num_layers}", student)
    torch.testing.assert_close(features(IDS), expected, rtol=0, atol=0)
    assert features.num_ids == 96


def test_all_layers_give_what_the_final_norm_reads(student: PreTrainedModel) -> None:
    decoder = student.get_decoder()
    expected = decoder(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(decoder.norm(make_featurizer("hidden@4", student)(IDS)), expected, rtol=0, atol=0)


def test_padding_on_the_right_is_not_seen(student: PreTrainedModel) -> None:
    features = make_featurizer("hidden@4", student)
    torch.testing.assert_close(features(IDS)[:, :7], features(IDS[:, :7]), rtol=1e-4, atol=1e-5)


def test_the_student_is_shared_and_stays_as_it_is(student: PreTrainedModel) -> None:
    before, names = student(input_ids=IDS).logits, list(student.state_dict())
    features = make_featurizer("hidden@2", student)
    assert not features(IDS).requires_grad
    assert torch.equal(student(input_ids=IDS).logits, before)
    assert list(student.state_dict()) == names
    assert (student.config.num_hidden_layers, len(student.get_decoder().layers)) == (4, 4)
    # The featurizer makes no copy: a change in the student changes its features.
    table = student.get_input_embeddings().weight
    was = features(IDS)
    with torch.no_grad():
        table.mul_(2)
        changed = features(IDS)
        table.div_(2)
    assert not torch.equal(changed, was)


@pytest.mark.parametrize("name", ["hidden@0", "hidden@", "hidden", "pooled", "hidden@1.5", "embeddings\n", ""])
def test_names_that_mean_nothing_are_refused(name: str, student: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"there is no featurizer .* choose embeddings or hidden@K"):
        make_featurizer(name, student)


def test_more_layers_than_there_are_are_refused(student: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="hidden@5 needs 5 decoder layers, but the student has 4"):
        make_featurizer("hidden@5", student)
