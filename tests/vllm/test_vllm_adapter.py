"""Compare an exported adapter in a real vLLM with the student it was trained on, by the log-probabilities of generated tokens.

Only dense students are tested: on a CPU, vLLM's mixture of experts does not support adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import configurations, write_model, write_tokenizer
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm_world import ENGINE_ARGS

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.lora import HookBasedLoRAInjector
from hyperagent.model.peft_io import encode_adapter
from hyperagent.model.targets import discover_target_layers

RANK, ALPHA = 8, 16.0
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 20, 24


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, torch.dtype, LLM]]:
    folder = tmp_path / "student"
    write_model(folder, configurations()["qwen3"], dtype=request.param)
    write_tokenizer(folder)
    name = str(request.param).removeprefix("torch.")
    engine = LLM(
        str(folder), dtype=name, max_model_len=256, enable_lora=True, max_lora_rank=RANK, max_loras=1, **ENGINE_ARGS
    )
    try:
        yield folder, request.param, engine
    finally:
        engine.llm_engine.engine_core.shutdown()


def make_adapter(student: torch.nn.Module, dtype: torch.dtype) -> AdapterWeights:
    torch.manual_seed(1)
    return {
        layer.name: LoRAPair(
            (torch.randn(RANK, layer.in_features) * layer.in_features**-0.5).to(dtype),
            (torch.randn(layer.out_features, RANK) * 0.1).to(dtype),
        )
        for layer in discover_target_layers(student)
    }


def export(weights: AdapterWeights, folder: Path) -> None:
    folder.mkdir()
    files = encode_adapter(weights, base_model="student", alpha=ALPHA, origin={})
    (folder / MODEL_FILE).write_bytes(files.model)
    (folder / CONFIG_FILE).write_bytes(files.config)


@pytest.mark.timeout(300)
def test_vllm_generates_with_an_exported_adapter_as_the_injected_student_would(
    world: tuple[Path, torch.dtype, LLM], tmp_path: Path
) -> None:
    folder, dtype, engine = world
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    weights = make_adapter(student, dtype)
    export(weights, tmp_path / "adapter")
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(0, 300, (NUM_PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True, detokenize=False),
        lora_request=LoRARequest("adapter", 1, str(tmp_path / "adapter")),
        use_tqdm=False,
    )
    generated = torch.tensor([output.outputs[0].token_ids for output in outputs])
    served = np.array([
        [position[int(token)].logprob for position, token in zip(o.outputs[0].logprobs, tokens, strict=True)]
        for o, tokens in zip(outputs, generated, strict=True)
    ])  # fmt: skip

    def logprobs() -> NDArray[np.float64]:
        ids = torch.cat([torch.tensor(prompts), generated], dim=1)
        with torch.no_grad():
            rows = student(input_ids=ids).logits[:, PROMPT_TOKENS - 1 : -1].double().log_softmax(-1)
        return rows.gather(2, generated[..., None])[..., 0].numpy()

    batched = {name: LoRAPair(*(f.expand(NUM_PROMPTS, -1, -1) for f in (p.a, p.b))) for name, p in weights.items()}
    with HookBasedLoRAInjector(student, scale=ALPHA / RANK).inject(batched):
        injected = logprobs()
    difference, effect = np.abs(served - injected), np.abs(served - logprobs())
    p50, p99 = (1e-5, 2e-5) if dtype == torch.float32 else (0.03, 0.2)
    assert np.quantile(difference, 0.5) <= p50
    assert np.quantile(difference, 0.99) <= p99
    # Without the adapter the same tokens have clearly different probabilities.
    assert np.quantile(effect, 0.5) >= 1
