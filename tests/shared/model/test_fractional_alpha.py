"""Test that a fractional alpha reaches the bundle, PEFT's files, PEFT itself and the adapter that is read back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_identity import data_identity
from peft import PeftModel
from tiny_models import configurations
from transformers import AutoModelForCausalLM

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.model.adapter import LoRAPair
from hyperagent.model.bundle import BundleManifest, load_bundle, save_bundle
from hyperagent.model.config import HyperNetworkConfig
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.lora import HookBasedLoRAInjector
from hyperagent.model.peft_io import CONFIG_FILE, MODEL_FILE, encode_adapter, read_adapter
from hyperagent.model.static_lora import StaticLoRA
from hyperagent.model.targets import discover_target_layers


@pytest.mark.parametrize("alpha", [0.4, 2.5, 7.75])
def test_a_fractional_alpha_is_the_same_at_every_station(
    alpha: float, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    config = HyperNetworkConfig(
        width=16, num_latents=2, encoder_blocks=1, generator_blocks=1, num_heads=2, rank=3, alpha=alpha
    )
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(configurations()["qwen3"]).eval()
    layers = discover_target_layers(student)
    network = AgenticHyperNetwork(config, layers, 64)
    for head in network.b_parameters():
        torch.nn.init.normal_(head)
    assert network.scale == StaticLoRA(layers, rank=3, alpha=alpha).scale == alpha / 3

    manifest = BundleManifest(
        base_model="s",
        student_weights="w",
        teacher="t",
        data=data_identity(tokenizer.identity),
        condition=("task",),
        hypernetwork=config,
        layers=tuple(layers),
        max_prompt_tokens=50,
        step=1,
    )
    embeddings = student.get_input_embeddings().weight
    save_bundle(
        tmp_path / "bundle", manifest, hypernetwork=network, embeddings=embeddings, tokenizer_folder=tokenizer.folder, card=""
    )  # fmt: skip
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest.alpha == alpha

    weights = bundle.generate(np.arange(5, dtype=np.uint32))
    files = encode_adapter(weights, base_model="s", alpha=bundle.manifest.alpha, origin={})
    (tmp_path / MODEL_FILE).write_bytes(files.model)
    (tmp_path / CONFIG_FILE).write_bytes(files.config)
    assert json.loads(files.config)["lora_alpha"] == alpha
    read = read_adapter(tmp_path)
    assert (read.rank, read.alpha) == (3, alpha)

    ids = torch.arange(9)[None]
    batched = {name: LoRAPair(pair.a[None], pair.b[None]) for name, pair in weights.items()}
    with torch.no_grad():
        bare = student(input_ids=ids).logits
        with HookBasedLoRAInjector(student, scale=network.scale).inject(batched):
            adapted = student(input_ids=ids).logits
        found = PeftModel.from_pretrained(copy.deepcopy(student), tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, adapted, rtol=0, atol=1e-5)
    assert float((adapted - bare).abs().max()) > 1e-3
