"""The frozen student."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hyperagent.data.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError
from hyperagent.identity import weights_fingerprint

STUDENT_DTYPE = torch.float32
"""Of the student's weights, whatever their folder holds."""


class Student:
    """A frozen causal language model with its tokenizer, split into body and head.

    The body's output at index t predicts token t + 1.
    """

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        """Load from a folder of safetensors weights and tokenizer files.

        Raises:
            ConfigError: the folder lacks a file, or the model's vocabulary is smaller than the tokenizer's.
        """
        self.folder = folder
        self.weights = weights_fingerprint(folder)
        self.tokenizer = ChatTokenizer(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=STUDENT_DTYPE
        )
        self.model.to(device=device)  # type: ignore[call-arg]  # transformers' wrapper hides torch's signature
        self.model.eval().requires_grad_(False)
        self.embeddings: Tensor = self.model.get_input_embeddings().weight  # type: ignore[assignment]
        self.head: Tensor = self.model.get_output_embeddings().weight
        self.vocab_size = self.tokenizer.vocab_size
        if self.vocab_size > self.head.shape[0]:
            raise ConfigError(
                f"the tokenizer in {folder} has {self.vocab_size} entries, its model only {self.head.shape[0]}; "
                "put the student's own tokenizer beside its weights"
            )

    def hidden_states(self, token_ids_BT: Tensor) -> Tensor:
        """Final hidden states [B, T, D].

        Padding stands on the right and needs no mask: every layer is causal, so nothing before it can see it.
        """
        output: Tensor = self.model.get_decoder()(input_ids=token_ids_BT, use_cache=False).last_hidden_state
        return output
