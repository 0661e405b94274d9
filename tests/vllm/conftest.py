"""Fixtures: tiny models for a real vLLM on the CPU. These tests need a separate environment: `make test-vllm`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# vLLM reads these when it is imported.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)

import torch
from tiny_models import configurations, write_model, write_tokenizer
from vllm_world import ENGINE_ARGS, MAX_TOKENS, TEMPERATURES, TOP_K, Load

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent_teacher.engines.vllm import VllmEngine

# On a CPU, vLLM's Gated DeltaNet supports bfloat16 only.
DTYPES = {"qwen3": torch.float32, "qwen3_moe": torch.float32, "qwen3_next": torch.bfloat16}


def pytest_configure(config: pytest.Config) -> None:
    """Ignore the sockets that vLLM leaves to the garbage collector."""
    for warning in (
        "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore::UserWarning",
    ):
        config.addinivalue_line("filterwarnings", warning)


@pytest.fixture(autouse=True)
def leaves_no_global_state() -> None:
    """Replace the check of tests/conftest.py: vLLM changes its process for good, and these tests have one of their own."""


@pytest.fixture(autouse=True, scope="module")
def module_leaves_no_global_state() -> None:
    """Replace the module's check likewise."""


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with model and tokenizer, by architecture."""
    root = tmp_path_factory.mktemp("models")
    for name, config in configurations().items():
        write_model(root / name, config, dtype=DTYPES[name])
        write_tokenizer(root / name)
    write_tokenizer(root / "unpadded")
    vocab_size = ChatTokenizer(root / "unpadded").vocab_size
    write_model(root / "unpadded", configurations(vocab_size=vocab_size)["qwen3"])
    return {name: root / name for name in (*DTYPES, "unpadded")}


@pytest.fixture
def load(model_folders: dict[str, Path]) -> Load:
    """A function that loads an engine."""

    async def load_one(name: str, **settings: Any) -> VllmEngine:
        folder = model_folders[name]
        defaults: dict[str, Any] = {
            "top_k": TOP_K, "max_tokens": MAX_TOKENS, "temperatures": TEMPERATURES, "engine_args": ENGINE_ARGS,
        }  # fmt: skip
        return await VllmEngine.load(folder, tokenizer_folder=folder, **{**defaults, **settings})

    return load_one
