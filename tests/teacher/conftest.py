"""Tiny random teachers on disk, made once per session, and a service to ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from teacher_service import (
    CANARY_ROWS,
    TOKEN,
    GatedEngine,
    Serve,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from hyperagent.cache.store import TopKCache
from hyperagent.identity import TokenizerIdentity
from hyperagent.wire.client import TeacherClient
from hyperagent_teacher.config import TeacherSettings
from hyperagent_teacher.engine import ScoringEngine
from hyperagent_teacher.server import answer, bind
from hyperagent_teacher.transformers_engine import TransformersEngine

TOP_K = 16
MAX_TOKENS = 2048

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# 512 rows of the head for about 300 real tokens: the rest pads the vocabulary, as in the published models.
COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**COMMON, num_hidden_layers=2, head_dim=16, num_experts=4, norm_topk_prob=True),
    "qwen3_next": Qwen3NextConfig(
        **COMMON,
        num_hidden_layers=4,
        head_dim=32,
        num_experts=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=64,
    ),
}


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with model and tokenizer per architecture."""
    root = tmp_path_factory.mktemp("models")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    inner.train_from_iterator(["def score(rows): return sorted(rows, key=score)"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        folders[name] = root / name
        model = AutoModelForCausalLM.from_config(config)
        # A head of the default scale makes every row nearly uniform; real ones are peaked.
        model.get_output_embeddings().weight.data.mul_(20)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def engines(model_folders: dict[str, Path]) -> Iterator[dict[str, TransformersEngine]]:
    """An engine per architecture; none of them is ever closed by a test."""
    engines = {
        name: TransformersEngine(folder, tokenizer_folder=folder, top_k=TOP_K, max_tokens=MAX_TOKENS)
        for name, folder in model_folders.items()
    }
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="session")
def engine(engines: dict[str, TransformersEngine]) -> TransformersEngine:
    return engines["qwen3_moe"]


@pytest.fixture
def sequence(engine: TransformersEngine) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """60 token ids and 20 positions."""
    generator = np.random.default_rng(0)
    token_ids = generator.integers(0, engine.identity.vocab_size, 60).astype(np.uint32)
    positions = np.sort(generator.choice(np.arange(1, 60), 20, replace=False)).astype(np.uint32)
    return token_ids, positions


@pytest.fixture
def settings(tmp_path: Path) -> TeacherSettings:
    (tmp_path / "data").mkdir()
    return TeacherSettings(
        model=tmp_path, cache=tmp_path / "cache", data_dir=tmp_path / "data", port=0, max_pending_requests=2
    )


@pytest.fixture
def cache(settings: TeacherSettings, engine: ScoringEngine) -> TopKCache:
    return TopKCache.create_or_open(settings.cache, engine.identity)


@pytest.fixture
def serve(settings: TeacherSettings, engine: ScoringEngine, cache: TopKCache) -> Serve:
    """Runs a teacher and yields a client of it; by default the real engine, with the client waiting until it serves."""

    @asynccontextmanager
    async def run(
        engine: ScoringEngine = engine,
        cache: TopKCache = cache,
        *,
        stop: asyncio.Event | None = None,
        wait: bool = True,
        **changes: Any,
    ) -> AsyncIterator[TeacherClient]:
        changed = settings.model_copy(update={"stop_grace_s": 0.0, **changes})
        stop = stop or asyncio.Event()
        server, address = await bind(changed, token=TOKEN)
        answering = asyncio.create_task(answer(server, engine, cache, changed, stop=stop))
        async with TeacherClient(address, TOKEN) as client:
            if wait:
                await client.wait_until_serving(30)
            yield client
        stop.set()
        await answering

    return run


@pytest.fixture
def gated(engine: ScoringEngine) -> GatedEngine:
    """An engine that has just enough permits for the canary."""
    return GatedEngine(engine.identity, permits=CANARY_ROWS)


@pytest.fixture
def tokenizer(engine: ScoringEngine) -> TokenizerIdentity:
    return TokenizerIdentity(engine.identity.tokenizer_sha256, engine.identity.template_sha256)
