"""Test hypernetwork, injection, PEFT files and bundle on a tiny student of the real architecture."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_identity import data_identity
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3NextConfig

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError, CorruptRecord, InvalidRequest, LimitExceeded
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.bundle import BundleManifest, load_bundle, save_bundle
from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.lora import HookBasedLoRAInjector
from hyperagent.model.peft_io import encode_adapter
from hyperagent.model.targets import discover_target_layers

CONFIG = HyperNetworkConfig(width=32, num_latents=4, encoder_blocks=1, generator_blocks=1, num_heads=2, rank=4, alpha=8)


def next_config(**changes: object) -> Qwen3NextConfig:
    shape = {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 32, "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
        "full_attention_interval": 4, "max_position_embeddings": 512, "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }  # fmt: skip
    return Qwen3NextConfig(**{**shape, **changes})


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(next_config()).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def layers(student: PreTrainedModel) -> list[LayerInfo]:
    return discover_target_layers(student)


@pytest.fixture
def hypernetwork(layers: list[LayerInfo]) -> AgenticHyperNetwork:
    """Return a hypernetwork whose heads of B are not zero, as after training."""
    torch.manual_seed(1)
    network = AgenticHyperNetwork(CONFIG, layers, 32)
    for head in network.generator.b_heads.parameters():
        torch.nn.init.normal_(head, std=0.5)
    return network


def prompts(student: PreTrainedModel, num: int, length: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 96, (num, length), generator=torch.Generator().manual_seed(seed))
    return student.get_input_embeddings()(ids), torch.ones(num, length, dtype=torch.bool)


def one(weights: AdapterWeights, index: int) -> AdapterWeights:
    return {name: LoRAPair(p.a[index : index + 1], p.b[index : index + 1]) for name, p in weights.items()}


def test_before_training_the_student_is_unchanged_bit_for_bit(
    student: PreTrainedModel, layers: list[LayerInfo]
) -> None:
    torch.manual_seed(3)
    fresh = AgenticHyperNetwork(CONFIG, layers, 32)
    tokens = torch.randint(0, 96, (2, 20))
    with HookBasedLoRAInjector(student, scale=2.0).inject(fresh(*prompts(student, 2, 9))):
        adapted = student(input_ids=tokens).logits
    assert torch.equal(adapted, student(input_ids=tokens).logits)


def test_gradients_reach_every_parameter(student: PreTrainedModel, layers: list[LayerInfo]) -> None:
    torch.manual_seed(3)
    network = AgenticHyperNetwork(CONFIG, layers, 32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    tokens = torch.randint(0, 96, (2, 20))
    for step in (0, 1):
        with HookBasedLoRAInjector(student, scale=2.0).inject(network(*prompts(student, 2, 9))):
            loss = student(input_ids=tokens).logits.log_softmax(-1)[..., 0].mean()
        optimizer.zero_grad()
        loss.backward()
        reached = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        expected = {name for name, _ in network.named_parameters() if step == 1 or ".b_heads." in name}
        assert reached == expected, step
        optimizer.step()


def test_padding_of_the_prompt_changes_nothing(student: PreTrainedModel, hypernetwork: AgenticHyperNetwork) -> None:
    embeddings, mask = prompts(student, 1, 7)
    padded = torch.cat([embeddings, torch.full((1, 5, 32), 9.0)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(1, 5, dtype=torch.bool)], dim=1)
    plain, other = hypernetwork(embeddings, mask), hypernetwork(padded, padded_mask)
    for name in plain:
        torch.testing.assert_close(plain[name].b, other[name].b, rtol=1e-4, atol=1e-5)


def test_prompts_make_different_adapters_and_ranks_differ(
    student: PreTrainedModel, hypernetwork: AgenticHyperNetwork
) -> None:
    with torch.no_grad():
        weights = hypernetwork(*prompts(student, 2, 9))
    for pair in weights.values():
        assert float((pair.a[0] - pair.a[1]).abs().max()) > 1e-3
        assert int(torch.linalg.matrix_rank(pair.b[0].double() @ pair.a[0].double())) == CONFIG.rank


def test_injection_equals_merged_weights(student: PreTrainedModel, hypernetwork: AgenticHyperNetwork) -> None:
    """Compare with an oracle: a float64 copy of the student with W + scale * B A in place of W."""
    tokens = torch.randint(0, 96, (3, 33), generator=torch.Generator().manual_seed(5))
    weights = hypernetwork(*prompts(student, 3, 9))
    double = {name: LoRAPair(p.a.double(), p.b.double()) for name, p in weights.items()}
    student64 = copy.deepcopy(student).double()
    # The grouped matrix product does not support float64.
    student64.set_experts_implementation("eager")
    with HookBasedLoRAInjector(student64, scale=CONFIG.scale).inject(double):
        adapted = student64(input_ids=tokens).logits
    for sample in range(3):
        merged = copy.deepcopy(student64)
        for name, pair in double.items():
            merged.get_submodule(name).weight.data += (CONFIG.scale * pair.b[sample] @ pair.a[sample]).detach()
        expected = merged(input_ids=tokens[sample : sample + 1]).logits[0]
        torch.testing.assert_close(adapted[sample], expected, rtol=1e-6, atol=1e-6)


def test_each_sample_has_its_own_adapter_and_padding_is_not_seen(
    student: PreTrainedModel, hypernetwork: AgenticHyperNetwork
) -> None:
    tokens = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(6))
    weights = hypernetwork(*prompts(student, 2, 9))
    injector = HookBasedLoRAInjector(student, scale=CONFIG.scale)
    with injector.inject(weights):
        together = student(input_ids=tokens).logits
    with injector.inject(one(weights, 1)):
        alone = student(input_ids=tokens[1:, :25]).logits
    torch.testing.assert_close(together[1:, :25], alone, rtol=1e-4, atol=1e-4)


def test_nothing_stays_behind(student: PreTrainedModel, hypernetwork: AgenticHyperNetwork) -> None:
    tokens = torch.randint(0, 96, (1, 8))
    before, names = student(input_ids=tokens).logits, list(student.state_dict())
    values = copy.deepcopy(student.state_dict())
    weights = hypernetwork(*prompts(student, 2, 9))
    with HookBasedLoRAInjector(student, scale=2.0).inject(one(weights, 0)):
        assert not torch.equal(student(input_ids=tokens).logits, before)
        assert list(student.state_dict()) == names
    assert all(torch.equal(value, values[name]) for name, value in student.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in student.modules())
    assert torch.equal(student(input_ids=tokens).logits, before)
    # Two adapters for one sample: the hook raises in the middle of the forward pass.
    with (
        pytest.raises(InvalidRequest, match="one adapter per sample"),
        HookBasedLoRAInjector(student, scale=2.0).inject(weights),
    ):
        student(input_ids=tokens)
    assert list(student.state_dict()) == names
    assert all(torch.equal(value, values[name]) for name, value in student.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in student.modules())
    assert torch.equal(student(input_ids=tokens).logits, before)
    stranger = {"model.layers.0.linear_attn.nothing": next(iter(weights.values()))}
    with (
        pytest.raises(InvalidRequest, match="made for another student"),
        HookBasedLoRAInjector(student, scale=2.0).inject(stranger),
    ):
        pass


def test_peft_loads_what_is_written(
    student: PreTrainedModel, hypernetwork: AgenticHyperNetwork, tmp_path: Path
) -> None:
    weights = one(hypernetwork(*prompts(student, 1, 9)), 0)
    tokens = torch.randint(0, 96, (1, 30))
    with HookBasedLoRAInjector(student, scale=CONFIG.scale).inject(weights):
        expected = student(input_ids=tokens).logits
    files = encode_adapter(
        {n: LoRAPair(p.a[0], p.b[0]) for n, p in weights.items()},
        base_model="s",
        alpha=CONFIG.alpha,
        origin={"b": "2", "a": "1"},
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(files.model)
    (tmp_path / "adapter_config.json").write_bytes(files.config)
    loaded = PeftModel.from_pretrained(copy.deepcopy(student), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    assert json.loads(files.config)["r"] == CONFIG.rank


def test_factors_that_are_not_finite_are_never_written() -> None:
    bad = {"x": LoRAPair(torch.full((4, 8), torch.nan), torch.zeros(8, 4))}
    with pytest.raises(CorruptRecord, match="not finite"):
        encode_adapter(bad, base_model="s", alpha=8, origin={})
    with pytest.raises(InvalidRequest, match="one rank"):
        encode_adapter({}, base_model="s", alpha=8, origin={})


@pytest.fixture
def bundle_folder(
    student: PreTrainedModel,
    layers: list[LayerInfo],
    hypernetwork: AgenticHyperNetwork,
    tokenizer: ChatTokenizer,
    tmp_path: Path,
) -> Path:
    manifest = BundleManifest(
        base_model="s",
        student_weights="w",
        teacher="t",
        data=data_identity(tokenizer.identity),
        condition=("task",),
        hypernetwork=CONFIG,
        layers=tuple(layers),
        max_prompt_tokens=50,
        step=3,
    )
    embeddings = student.get_input_embeddings().weight
    save_bundle(
        tmp_path / "bundle",
        manifest,
        hypernetwork=hypernetwork,
        embeddings=embeddings,
        tokenizer_folder=tokenizer.folder,
        card="",
    )
    return tmp_path / "bundle"


def test_a_bundle_generates_what_the_hypernetwork_does(
    bundle_folder: Path, student: PreTrainedModel, hypernetwork: AgenticHyperNetwork
) -> None:
    bundle = load_bundle(bundle_folder)
    ids = np.arange(7, dtype=np.uint32)
    weights = bundle.generate(ids)
    embeddings = student.get_input_embeddings()(torch.arange(7))[None]
    expected = hypernetwork(embeddings, torch.ones(1, 7, dtype=torch.bool))
    for name, pair in weights.items():
        torch.testing.assert_close(pair.a, expected[name].a[0])
        torch.testing.assert_close(pair.b, expected[name].b[0])
    with pytest.raises(LimitExceeded, match="the prompt has 51 tokens, this hypernetwork reads at most 50"):
        bundle.generate(np.zeros(51, dtype=np.uint32))
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        bundle.generate(np.zeros(0, dtype=np.uint32))
    with pytest.raises(InvalidRequest, match="prompt id 96 is outside"):
        bundle.generate(np.array([96], dtype=np.uint32))


def test_a_bundle_with_a_damaged_or_missing_file_is_refused(
    bundle_folder: Path, flip_byte: Callable[[Path, int], None], tmp_path: Path
) -> None:
    unchecked = {"bundle.json", "README.md"}
    files = [path for path in bundle_folder.rglob("*") if path.is_file() and path.name not in unchecked]
    assert len(files) == 5
    for number, path in enumerate(files):
        broken = tmp_path / f"broken-{number}"
        shutil.copytree(bundle_folder, broken)
        flip_byte(broken / path.relative_to(bundle_folder), -1)
        with pytest.raises(CorruptRecord, match="not the file that the bundle was made with"):
            load_bundle(broken)
        (broken / path.relative_to(bundle_folder)).unlink()
        with pytest.raises(CorruptRecord, match="the bundle lacks"):
            load_bundle(broken)
    with pytest.raises(ConfigError, match="is not a bundle"):
        load_bundle(tmp_path)
