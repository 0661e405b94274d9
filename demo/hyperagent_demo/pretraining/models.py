"""Build tiny models of the real architectures, and the compact vocabulary for their pre-training.

A few hundred trajectories use a few thousand of a real tokenizer's 151,669 entries, so a model is pre-trained with
one row per used entry and one row that represents all others: the softmax over "used or other", with log(number of
others) added to the last logit, is exactly the softmax over the whole vocabulary in which all unused entries share one
logit. `expand_vocabulary` then copies that row to each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from hyperagent_demo.config import PretrainConfig, Role

# Embedding tables are padded to a multiple of this, as in released models, so that there are padding rows to mask.
_VOCABULARY_MULTIPLE = 64


class CompactVocabulary:
    """The used entries of a tokenizer's vocabulary, and one entry for all others."""

    def __init__(self, used: Iterable[int], vocab_size: int) -> None:
        self.used = np.unique(np.fromiter(used, dtype=np.int64))
        self.vocab_size = vocab_size
        self._compact = np.full(vocab_size, len(self.used), dtype=np.int64)
        self._compact[self.used] = np.arange(len(self.used))
        self.num_others = vocab_size - len(self.used)
        self._bias = torch.zeros(len(self))
        self._bias[-1] = math.log(self.num_others) if self.num_others else -math.inf

    def __len__(self) -> int:
        return len(self.used) + 1

    def encode(self, ids: NDArray[np.uint32]) -> Tensor:
        """Return the compact ids (int64) of a tokenizer's ids."""
        return torch.from_numpy(self._compact[ids])

    def full_logits(self, logits: Tensor) -> Tensor:
        """Return logits [..., len(self)] whose softmax gives the probability of each used entry and of all others."""
        return logits + self._bias


def build_model(role: Role, config: PretrainConfig, *, vocab_size: int, max_tokens: int) -> PreTrainedModel:
    """Build a randomly initialized tiny model: the teacher is a Qwen3-MoE, the student a Qwen3-Next."""
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_experts": config.num_experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": config.hidden_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "max_position_embeddings": max(max_tokens, 4096),
        "tie_word_embeddings": False,
        # The default of 0.02 suits widths in the thousands; a tiny model learns faster from 1/sqrt(width).
        "initializer_range": config.hidden_size**-0.5 / 2,
    }
    if role == "teacher":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared))
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **shared,
            shared_expert_intermediate_size=config.hidden_size,
            full_attention_interval=min(4, config.num_layers),  # type: ignore[call-arg]  # read from **kwargs
            linear_conv_kernel_dim=4,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
        )
    )


@torch.no_grad()
def expand_vocabulary(model: PreTrainedModel, vocabulary: CompactVocabulary) -> None:
    """Expand a model trained in a compact vocabulary to the tokenizer's ids, in place."""
    num_rows = -(-vocabulary.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    used = torch.from_numpy(vocabulary.used)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        compact: Tensor = layer.weight  # type: ignore[assignment]
        full = compact[-1].repeat(num_rows, 1)
        full[used] = compact[:-1]
        layer.weight = torch.nn.Parameter(full)
    model.get_input_embeddings().num_embeddings = num_rows  # type: ignore[assignment]
    model.get_output_embeddings().out_features = num_rows
    model.config.vocab_size = num_rows
