"""Fixtures: a tiny student, and a bundle for it whose adapters have an effect."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from data_identity import data_identity
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, Qwen3NextConfig, Qwen3NextForCausalLM

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.pipeline.views import Condition, condition_ids
from hyperagent.identity import weights_fingerprint
from hyperagent.model.bundle import BundleManifest, load_bundle, save_bundle
from hyperagent.model.config import HyperNetworkConfig
from hyperagent.model.featurizer import EmbeddingFeaturizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.prompt_distance import PromptStatistics, prompt_statistics
from hyperagent.model.targets import discover_target_layers
from hyperagent_adapter_api.app import create_adapter_app
from hyperagent_adapter_api.generator import AdapterGenerator
from hyperagent_adapter_api.service import AdapterService
from hyperagent_adapter_api.store import AdapterStore

TOKEN = "secret"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant fix the failing test in the parser"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    config = Qwen3NextConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_conv_kernel_dim=4, moe_intermediate_size=64, shared_expert_intermediate_size=64, intermediate_size=128,
        num_experts=8, num_experts_per_tok=2, full_attention_interval=4, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3NextForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def student(student_folder: Path) -> PreTrainedModel:
    return Qwen3NextForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def hypernetwork(student: PreTrainedModel) -> AgenticHyperNetwork:
    config = HyperNetworkConfig(width=32, num_latents=4, encoder_blocks=1, generator_blocks=1, rank=4, alpha=8.0)
    torch.manual_seed(1)
    hypernetwork = AgenticHyperNetwork(config, discover_target_layers(student), student.config.hidden_size)
    for head in hypernetwork.generator.b_heads.values():
        torch.nn.init.normal_(head.weight, std=0.5)
    return hypernetwork


@pytest.fixture(scope="session")
def write_bundle(
    student: PreTrainedModel, hypernetwork: AgenticHyperNetwork, student_folder: Path
) -> Callable[[Path, PromptStatistics | None], Path]:
    """Writes a bundle, with or without prompt statistics."""

    def write(folder: Path, statistics: PromptStatistics | None) -> Path:
        manifest = BundleManifest(
            base_model=str(student_folder),
            student_weights=weights_fingerprint(student_folder),
            teacher="ab" * 32,
            data=data_identity(ChatTokenizer(student_folder).identity),
            condition=("task",),
            hypernetwork=hypernetwork.config,
            layers=hypernetwork.generator.layers,
            max_prompt_tokens=200,
            step=7,
        )
        save_bundle(
            folder,
            manifest,
            hypernetwork=hypernetwork,
            embeddings=student.get_input_embeddings().weight,
            tokenizer_folder=student_folder,
            card="",
            statistics=statistics,
        )
        return folder

    return write


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory, write_bundle: Callable[..., Path]) -> Path:
    return write_bundle(tmp_path_factory.mktemp("out") / "bundle", None)


@pytest.fixture(scope="session")
def watchful_bundle_folder(
    tmp_path_factory: pytest.TempPathFactory,
    write_bundle: Callable[..., Path],
    student: PreTrainedModel,
    hypernetwork: AgenticHyperNetwork,
    student_folder: Path,
) -> Path:
    """The same bundle with statistics of prompts that name a failing test by its number."""
    tokenizer = ChatTokenizer(student_folder)
    prompts = [
        condition_ids(tokenizer, Condition(f"fix the failing test {number} in the parser"), parts=["task"])
        for number in range(100, 180)
    ]
    featurizer = EmbeddingFeaturizer(student.get_input_embeddings().weight)
    statistics = prompt_statistics(hypernetwork, featurizer, prompts[::2], prompts[1::2])
    return write_bundle(tmp_path_factory.mktemp("watchful") / "bundle", statistics)


@pytest.fixture(scope="session")
def generator(bundle_folder: Path) -> AdapterGenerator:
    return AdapterGenerator(load_bundle(bundle_folder))


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


@pytest.fixture
def client(generator: AdapterGenerator, store_folder: Path) -> Iterator[TestClient]:
    service = AdapterService(
        generator, AdapterStore(store_folder, generator.bundle.fingerprint, max_bytes=1 << 30), max_pending_requests=4
    )
    app = create_adapter_app(service, token=TOKEN)
    with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}, raise_server_exceptions=False) as client:
        yield client
