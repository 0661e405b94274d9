"""The engine that runs a Transformers model in this process, on a CPU or one GPU.

All of a model's work happens on one thread of the engine's own, so requests take turns: one request's body
(all layers over all tokens), then its head (vocabulary over some rows at a time), with other requests' turns
in between. Only hidden states of the wanted positions are kept, and never [T, V] logits.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hyperagent.data.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError, LimitExceeded
from hyperagent.identity import TeacherIdentity, weights_fingerprint
from hyperagent.topk import TopKRows
from hyperagent_teacher.topk_head import top_k_rows

MAX_LOGITS_PER_CHUNK = 1 << 25
"""Numbers in one chunk of logits: 128 MiB in float32."""
MAX_ROWS_PER_CHUNK = 1024
"""A small vocabulary's rows would otherwise all be one chunk, which nothing could interrupt."""


class TransformersEngine:
    """A frozen causal language model with its tokenizer; a `ScoringEngine`."""

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer_folder: Path,
        top_k: int,
        max_tokens: int,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        """Load from a folder of safetensors weights.

        Args:
            top_k: ids per row, the most a request may ask for.
            max_tokens: longest sequence accepted; the model's own limit holds where it is lower.
            dtype: "auto" (the weights' own), "float32", "bfloat16" or "float16".
            device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

        Raises:
            ConfigError: a folder, a setting or the combination of model and tokenizer cannot be used.
        """
        weights = weights_fingerprint(folder)
        tokenizer = ChatTokenizer(tokenizer_folder)
        self._vocab_size = tokenizer.vocab_size
        self._device = _device(device)
        self._model = _load(folder, dtype).to(device=self._device)  # type: ignore[call-arg]  # an untyped decorator
        self._model.eval().requires_grad_(False)
        self._head = self._model.get_output_embeddings()
        _require_fitting(self._model, folder, vocab_size=self._vocab_size, top_k=top_k)
        self._rows_per_chunk = min(MAX_ROWS_PER_CHUNK, max(1, MAX_LOGITS_PER_CHUNK // self._head.weight.shape[0]))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self.max_tokens = min(max_tokens, self._model.config.max_position_embeddings)
        self.identity = TeacherIdentity(
            model=folder.resolve().name,
            weights=weights,
            dtype=str(self._model.dtype).removeprefix("torch."),
            backend=f"transformers-{transformers.__version__}",
            tokenizer_sha256=tokenizer.identity.tokenizer_sha256,
            template_sha256=tokenizer.identity.template_sha256,
            vocab_size=self._vocab_size,
            top_k=top_k,
        )

    async def score(
        self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, top_k: int
    ) -> AsyncGenerator[TopKRows, None]:
        """See `ScoringEngine.score`. A computation that is told to stop does so within one layer's time."""
        stop = threading.Event()
        steps = self._steps(token_ids, positions, top_k, stop)
        loop = asyncio.get_running_loop()
        try:
            while (rows := await loop.run_in_executor(self._thread, next, steps, None)) is not None:
                yield rows
        finally:
            stop.set()

    def close(self) -> None:
        """Wait for the step in progress and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _steps(
        self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], top_k: int, stop: threading.Event
    ) -> Iterator[TopKRows]:
        hidden_ND = self._hidden_states(token_ids, positions, stop)
        targets_N = torch.from_numpy(token_ids[positions].astype(np.int64)).to(self._device)
        for start in range(0, len(positions), self._rows_per_chunk):
            _leave_if(stop)
            cut = slice(start, start + self._rows_per_chunk)
            with torch.inference_mode():
                logits_NV = self._head(hidden_ND[cut])[:, : self._vocab_size]
            yield top_k_rows(logits_NV, targets_N[cut], positions[cut], top_k=top_k)

    @torch.inference_mode()
    def _hidden_states(
        self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], stop: threading.Event
    ) -> Tensor:
        """[N, D]: what the head makes the rows of `positions` from, so the output one token before each."""
        body = self._model.get_decoder()
        ids_1T = torch.from_numpy(token_ids.astype(np.int64)[None]).to(self._device)
        before_N = torch.from_numpy(positions.astype(np.int64) - 1).to(self._device)
        hooks = [layer.register_forward_pre_hook(lambda *_: _leave_if(stop)) for layer in body.layers]
        try:
            _leave_if(stop)
            hidden_1TD: Tensor = body(input_ids=ids_1T, use_cache=False).last_hidden_state
            return hidden_1TD[0, before_N]
        except torch.OutOfMemoryError as error:
            raise LimitExceeded(
                f"{len(token_ids):,} tokens do not fit in the memory of {self._device}; lower the teacher's --max-tokens"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()


class _Stopped(Exception):
    """Nobody waits for the rows any more. Raised on the engine's thread, where it ends the step and goes no further."""


def _leave_if(stop: threading.Event) -> None:
    if stop.is_set():
        raise _Stopped


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"there is no device {name!r}; give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"this machine has {torch.cuda.device_count()} usable GPUs, so no {name}; give --device cpu")
    return device


def _load(folder: Path, dtype: str) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"cannot load a model from {folder}: {' '.join(str(error).split())}") from error
    model: PreTrainedModel
    model, report = loaded
    # Transformers fills what the files lack with random numbers and only warns.
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"the weights in {folder} lack {len(missing)} tensors, the first is {missing[0]}; get the whole model"
        )
    return model


@torch.inference_mode()
def _require_fitting(model: PreTrainedModel, folder: Path, *, vocab_size: int, top_k: int) -> None:
    head = model.get_output_embeddings()
    if vocab_size > head.weight.shape[0]:
        raise ConfigError(
            f"the tokenizer has {vocab_size} entries, the model in {folder} only {head.weight.shape[0]}; "
            "give the model's own tokenizer (--tokenizer)"
        )
    if not 1 <= top_k <= vocab_size:
        raise ConfigError(f"--top-k must lie in [1, {vocab_size}], the size of the vocabulary, not {top_k}")
    # Some architectures scale or cap the head's output in `forward`, which scoring goes around.
    ids_1T = torch.arange(min(4, vocab_size), device=model.device)[None]
    whole = model(input_ids=ids_1T, use_cache=False).logits
    parts = head(model.get_decoder()(input_ids=ids_1T, use_cache=False).last_hidden_state)
    if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"the model in {folder} ({model.config.model_type}) changes its head's output, which this engine does not "
            "reproduce; serve a model whose logits are its head's output alone, such as Qwen3-MoE or Qwen3-Next"
        )
