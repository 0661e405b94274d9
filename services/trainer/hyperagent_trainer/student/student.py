"""Load the frozen student and run it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.version import Version
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_flash_linear_attention_available

from hyperagent.architecture import LINEAR_ATTENTION, layer_types
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError
from hyperagent.identity import weights_fingerprint
from hyperagent_trainer.student.sharding import load_sharded

_LEAST_KERNELS = Version("0.5")
"""First release of flash-linear-attention whose kernels know fewer query heads than value heads, as Qwen3-Next has."""


class Student:
    """A frozen causal language model with its tokenizer, split into body and head.

    The body's output at index t predicts token t + 1.
    """

    def __init__(
        self, folder: Path, *, device: torch.device, dtype: torch.dtype = torch.float32, mesh: DeviceMesh | None = None
    ) -> None:
        """Load the student from a folder of safetensors weights and tokenizer files.

        Args:
            dtype: dtype of the loaded weights, whatever the folder holds.
            mesh: devices over which the student is sharded; it is not sharded without.

        Raises:
            ConfigError: the folder lacks a file, the model's vocabulary is smaller than the tokenizer's, or on a GPU the
                kernels of Gated DeltaNet layers cannot be imported.
        """
        self.folder = folder
        self.weights = weights_fingerprint(folder)
        self.tokenizer = ChatTokenizer(folder)
        self.model: PreTrainedModel = (
            _load_whole(folder, device, dtype)
            if mesh is None
            else load_sharded(folder, mesh, device=device, dtype=dtype)
        )
        _require_kernels(self.model, device)
        self.embeddings: Tensor = self.model.get_input_embeddings().weight  # type: ignore[assignment]
        self.head: Tensor = self.model.get_output_embeddings().weight
        self.vocab_size = self.tokenizer.vocab_size
        if self.vocab_size > self.head.shape[0]:
            raise ConfigError(
                f"the tokenizer in {folder} has {self.vocab_size} entries, its model only {self.head.shape[0]}; "
                "put the student's own tokenizer into the folder of its weights"
            )

    def hidden_states(self, token_ids_BT: Tensor) -> Tensor:
        """Return the final hidden states [B, T, D].

        Padding must be on the right and needs no mask: every layer is causal, so no token before it depends on it.
        """
        output: Tensor = self.model.get_decoder()(input_ids=token_ids_BT, use_cache=False).last_hidden_state
        return output


def _load_whole(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=dtype
    )
    model.to(device=device)  # type: ignore[call-arg]  # transformers' wrapper hides torch's signature
    return model.eval().requires_grad_(False)


def _require_kernels(model: PreTrainedModel, device: torch.device) -> None:
    """Check that the kernels of Gated DeltaNet layers can be imported on a GPU.

    Without them transformers only warns and falls back to a loop in PyTorch, which takes hours at 131,072 tokens.

    Raises:
        ConfigError: the student needs the kernels and they cannot be imported.
    """
    if device.type != "cuda" or LINEAR_ATTENTION not in layer_types(model.config.get_text_config()):
        return
    why = "flash-linear-attention is not installed, or too old"
    found = _version_of("flash-linear-attention")
    if found is not None and found < _LEAST_KERNELS:
        why = f"flash-linear-attention {found} knows no grouped value heads and would give wrong numbers"
    elif is_flash_linear_attention_available():
        try:
            # transformers imports them too when it defines the layer, but reports every error as "not installed".
            kernels = import_module("fla.ops.gated_delta_rule")
        except (ImportError, OSError, RuntimeError) as error:
            why = f"importing them fails with {type(error).__name__}: {error}"
        else:
            if hasattr(kernels, "chunk_gated_delta_rule"):
                return
    raise ConfigError(
        f"the student has Gated DeltaNet layers, but their GPU kernels cannot be used: {why}; "
        f"install version {_LEAST_KERNELS} or later with `make setup-gpu`, or `pip install './services/trainer[gpu]'` in the repository"
    )


def _version_of(package: str) -> Version | None:
    try:
        return Version(version(package))
    except PackageNotFoundError:
        return None
