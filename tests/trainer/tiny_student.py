"""Write a tiny random Qwen3-Next with its tokenizer to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3NextConfig, Qwen3NextForCausalLM

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NUM_BYTES = 256


def tiny_config(**changes: Any) -> Qwen3NextConfig:
    """Return a config with three Gated DeltaNet layers and one of attention, all with experts, and padding vocabulary rows."""
    shape = {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "full_attention_interval": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return Qwen3NextConfig(**{**shape, **changes})


def real_config() -> Qwen3NextConfig:
    """Return the config of Qwen3-Coder-Next, 80B, from its published config.json."""
    return Qwen3NextConfig(
        vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=2,
        head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, moe_intermediate_size=512, shared_expert_intermediate_size=512, num_experts=512,
        num_experts_per_tok=10, full_attention_interval=4, tie_word_embeddings=False,
    )  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges and with two control tokens: 258 entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_tiny_student(folder: Path, **changes: Any) -> Path:
    """Write a random student with seed 0 and the config `tiny_config` with `changes`."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    Qwen3NextForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    return folder
