"""Write tiny random teachers to disk, with the architectures of real teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The head has 512 rows for about 300 real tokens; the rest pads the vocabulary, as in published models.
_DENSE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    # The smallest head dimension that vLLM's attention supports on a CPU.
    "head_dim": 64,
}
_MOE = {**_DENSE, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}


def configurations(**changes: Any) -> dict[str, PreTrainedConfig]:
    """Return one tiny configuration per architecture; `changes` apply to all of them."""
    moe = {**_MOE, **changes}
    return {
        "qwen3": Qwen3Config(**{**_DENSE, **changes}, num_hidden_layers=2),
        "qwen3_moe": Qwen3MoeConfig(**moe, num_hidden_layers=2, num_experts=4),
        "qwen3_next": Qwen3NextConfig(
            **moe,
            num_hidden_layers=4,
            num_experts=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            shared_expert_intermediate_size=64,
        ),
    }


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of about 300 entries with a chat template."""
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
    tokenizer.save_pretrained(folder)


def write_model(folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a random model with the given config."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    # A head of the default scale makes every row nearly uniform; real rows are peaked.
    model.get_output_embeddings().weight.data.mul_(20)
    model.to(dtype).save_pretrained(folder)


def write_models(root: Path, **changes: Any) -> dict[str, Path]:
    """Write one folder with model and tokenizer per architecture and return the folders by architecture."""
    folders = {}
    for name, config in configurations(**changes).items():
        folders[name] = root / name
        write_model(folders[name], config)
        write_tokenizer(folders[name])
    return folders
