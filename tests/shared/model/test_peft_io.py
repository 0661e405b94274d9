"""Test that the folders of this project and PEFT are read exactly and all others are refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from tiny_models import configurations
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.errors import ConfigError, CorruptRecord
from hyperagent.model.adapter import LoRAPair
from hyperagent.model.peft_io import encode_adapter, read_adapter

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj")
A, B = (f"base_model.model.{NAMES[0]}.lora_{factor}.weight" for factor in "AB")


def write(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    weights = {name: LoRAPair(torch.randn(4, 8).to(dtype), torch.randn(6, 4).to(dtype)) for name in NAMES}
    files = encode_adapter(weights, base_model="a/student", alpha=8, origin={"made_by": "a test"})
    (folder / MODEL_FILE).write_bytes(files.model)
    (folder / CONFIG_FILE).write_bytes(files.config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_is_read_and_written_again_byte_for_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path, dtype)
    adapter = read_adapter(tmp_path)
    assert (adapter.rank, adapter.alpha, adapter.base_model) == (4, 8.0, "a/student")
    assert adapter.fingerprint == blake3((tmp_path / MODEL_FILE).read_bytes()).hexdigest()
    assert list(adapter.weights) == sorted(NAMES)
    assert {factor.dtype for pair in adapter.weights.values() for factor in (pair.a, pair.b)} == {dtype}
    again = encode_adapter(adapter.weights, base_model="a/student", alpha=8, origin={"made_by": "a test"})
    assert again.model == (tmp_path / MODEL_FILE).read_bytes()
    assert again.config == (tmp_path / CONFIG_FILE).read_bytes()


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], r".*\.self_attn\.(q|o)_proj", list(NAMES[:1])], ids=str)
def test_pefts_own_folders_are_read(targets: str | list[str], tmp_path: Path) -> None:
    """Target modules are given as last parts of names, as a regular expression and as full names."""
    student = AutoModelForCausalLM.from_config(configurations()["qwen3"])
    model = get_peft_model(
        student, LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    )
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    for module in layers.values():
        nn.init.normal_(module.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert (adapter.rank, adapter.alpha, adapter.base_model) == (4, 6.0, "")
    assert list(adapter.weights) == sorted(layers)
    for name, module in layers.items():
        assert torch.equal(adapter.weights[name].a, module.lora_A["default"].weight)
        assert torch.equal(adapter.weights[name].b, module.lora_B["default"].weight)


def test_a_long_list_of_targets_that_peft_shortens_is_read(tmp_path: Path) -> None:
    """PEFT shortens a list of twenty or more names to the shortest endings that select the same layers."""
    shape = {**configurations()["qwen3"].to_dict(), "num_hidden_layers": 4, "layer_types": None}
    student = AutoModelForCausalLM.from_config(Qwen3Config(**shape))
    chosen = [name for name, _ in student.named_modules() if name.endswith("_proj") and "layers.3.mlp" not in name]
    assert len(chosen) > 20
    get_peft_model(student, LoraConfig(r=2, target_modules=chosen)).save_pretrained(tmp_path)
    assert sorted(json.loads((tmp_path / CONFIG_FILE).read_bytes())["target_modules"]) != sorted(chosen)
    assert list(read_adapter(tmp_path).weights) == sorted(chosen)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"use_rslora": True}, ConfigError, "use_rslora"),
        ({"use_dora": True}, ConfigError, "use_dora"),
        ({"bias": "lora_only"}, ConfigError, "bias"),
        ({"lora_bias": True}, ConfigError, "lora_bias"),
        ({"fan_in_fan_out": True}, ConfigError, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, ConfigError, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, ConfigError, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, ConfigError, "alpha_pattern"),
        ({"layers_to_transform": [0]}, ConfigError, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, ConfigError, "init_lora_weights"),
        ({"a_setting_of_a_later_release": {"x": 1}}, ConfigError, "a_setting_of_a_later_release"),
        ({"peft_type": "LOHA"}, ConfigError, "LOHA"),
        ({"peft_type": None}, ConfigError, "has type None"),
        ({"task_type": "SEQ_CLS"}, ConfigError, "SEQ_CLS"),
        ({"r": 5}, CorruptRecord, r"not \[5, I\]"),
        ({"r": 0}, CorruptRecord, "r = 0"),
        ({"r": True}, CorruptRecord, "r = True"),
        ({"r": "4"}, CorruptRecord, "r = '4'"),
        ({"lora_alpha": float("nan")}, CorruptRecord, "lora_alpha = nan"),
        ({"lora_alpha": -8}, CorruptRecord, "lora_alpha = -8"),
        ({"lora_alpha": None}, CorruptRecord, "lora_alpha = None"),
        ({"base_model_name_or_path": 3}, CorruptRecord, "names 3"),
        ({"target_modules": ["q_proj"]}, CorruptRecord, "there are factors for model.layers.0.self_attn.o_proj"),
        ({"target_modules": ["q_proj", "o_proj", "k_proj"]}, CorruptRecord, "there are no factors for k_proj"),
        ({"target_modules": ["proj"]}, CorruptRecord, "there are factors for"),
        ({"target_modules": ".*q_proj"}, CorruptRecord, "there are factors for model.layers.0.self_attn.o_proj"),
        ({"target_modules": "("}, CorruptRecord, "not a regular expression"),
        ({"target_modules": None}, CorruptRecord, "not a list of names"),
        ({"target_modules": [3]}, CorruptRecord, "not a list of names"),
    ],
    ids=str,
)
def test_another_kind_of_adapter_is_refused(
    settings: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_bytes())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **settings}))
    assert_refused(tmp_path, error, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(B), f"lacks tensor {B}"),
        (lambda t: t.pop(A), f"unknown tensor {B}"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "unknown tensor"),
        (lambda t: t.update({"model.x.lora_A.weight": t[A].clone()}), "unknown tensor model.x.lora_A.weight"),
        (lambda t: t.update({A: t[A][None]}), r"shapes \[1, 4, 8\]"),
        (lambda t: t.update({A: t[A][:3].clone()}), r"\[3, 8\]"),
        (lambda t: t.update({B: t[B][:, :3].clone()}), r"\[6, 3\]"),
        (lambda t: t.update({A: t[A].double()}), "torch.float64"),
        (lambda t: t.update({B: t[B].to(torch.int8)}), "torch.int8"),
        (lambda t: t[B].fill_(torch.inf), "not finite"),
        (lambda t: t.clear(), "no factors"),
    ],
)
def test_tensors_that_are_not_one_pair_per_layer_are_refused(
    change: Callable[[dict[str, Tensor]], object], words: str, tmp_path: Path
) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / MODEL_FILE)
    change(tensors)
    save_file(tensors, tmp_path / MODEL_FILE)
    assert_refused(tmp_path, CorruptRecord, words)


def test_folders_that_hold_no_adapter_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", ConfigError, "give a PEFT folder")
    write(tmp_path)
    whole = (tmp_path / MODEL_FILE).read_bytes()
    for content in (b"", whole[:-1], whole[:100], b"\xff" * 64, save({})[:7]):
        (tmp_path / MODEL_FILE).write_bytes(content)
        assert_refused(tmp_path, CorruptRecord, "not a safetensors file")
    (tmp_path / MODEL_FILE).unlink()
    assert_refused(tmp_path, ConfigError, MODEL_FILE)
    write(tmp_path)
    for content, words in ((b"{", "not JSON"), (b"\xff", "not JSON"), (b"[]", "a list")):
        (tmp_path / CONFIG_FILE).write_bytes(content)
        assert_refused(tmp_path, CorruptRecord, words)


def assert_refused(folder: Path, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as refusal:
        read_adapter(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)
