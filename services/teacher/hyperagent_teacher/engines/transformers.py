"""Run a Transformers model in this process, on a CPU or one GPU.

The engine computes on a single thread, one request at a time: first the decoder over chunks of a few thousand tokens
(chunked prefill), then the head over chunks of rows. A request keeps only the model's cache and the hidden states of
the requested positions in memory, never [T, V] logits.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
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

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError, EngineHangs, LimitExceeded
from hyperagent.identity import TeacherIdentity, weights_fingerprint
from hyperagent.topk import TopKRows
from hyperagent_teacher.engines.base import dtype_name, require_vocabulary
from hyperagent_teacher.engines.topk import top_k_rows

PREFILL_TOKENS = 2048
"""Tokens that the decoder processes at once, so that its activations do not grow with the sequence."""
MAX_LOGITS_PER_CHUNK = 1 << 25
"""Number of logits in one chunk: 128 MiB in float32."""
MAX_ROWS_PER_CHUNK = 1024
"""Row limit of one chunk. With a small vocabulary all rows would otherwise form one chunk, which cannot be interrupted."""


class TransformersEngine:
    """A `ScoringEngine` of a frozen causal language model with its tokenizer."""

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer_folder: Path,
        top_k: int,
        max_tokens: int,
        temperatures: Sequence[float] = (),
        dtype: str = "auto",
        head_dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        """Load the model from a folder of safetensors weights.

        Args:
            top_k: ids per row, the most a request may ask for.
            max_tokens: longest sequence accepted; the model's own limit holds where it is lower.
            temperatures: those other than 1 at which rows are exact, rising.
            dtype: "auto" (the weights' own), "float32", "bfloat16" or "float16".
            head_dtype: dtype of the head's product, "auto" (the model's) or "float32".
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
        head = self._model.get_output_embeddings()
        require_vocabulary(folder, model_vocab_size=head.weight.shape[0], vocab_size=self._vocab_size, top_k=top_k)
        _require_plain_head(self._model, folder)
        # Copied because the head may share its weight with the embedding.
        self._head = copy.deepcopy(head).float() if head_dtype == "float32" else head
        self.rows_per_step = min(MAX_ROWS_PER_CHUNK, max(1, MAX_LOGITS_PER_CHUNK // self._head.weight.shape[0]))
        self._turn = asyncio.Lock()
        self.progress = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self.max_tokens = min(max_tokens, self._model.config.max_position_embeddings)
        self.identity = TeacherIdentity(
            model=folder.resolve().name,
            weights=weights,
            dtype=dtype_name(self._model.dtype, self._head.weight.dtype),
            backend=f"transformers-{transformers.__version__}",
            tokenizer_sha256=tokenizer.identity.tokenizer_sha256,
            template_sha256=tokenizer.identity.template_sha256,
            vocab_size=self._vocab_size,
            top_k=top_k,
            temperatures=tuple(temperatures),
        )

    async def score(
        self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, top_k: int
    ) -> AsyncGenerator[TopKRows, None]:
        """See `ScoringEngine.score`. A cancelled computation stops within one layer's time."""
        stop = threading.Event()
        steps = self._steps(token_ids, positions, top_k, stop)
        loop = asyncio.get_running_loop()
        async with self._turn:
            try:
                while (rows := await loop.run_in_executor(self._thread, next, steps, None)) is not None:
                    self.progress += 1
                    yield rows
            finally:
                stop.set()

    async def restart(self) -> None:
        """Raise an error: a thread cannot be killed, so this engine cannot be restarted.

        Raises:
            EngineHangs: always.
        """
        raise EngineHangs("the model hangs and cannot be restarted within its process; start the teacher again")

    def close(self) -> None:
        """Wait for the step in progress and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _steps(
        self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], top_k: int, stop: threading.Event
    ) -> Iterator[TopKRows]:
        hidden_ND = self._hidden_states(token_ids, positions, stop)
        targets_N = torch.from_numpy(token_ids[positions].astype(np.int64)).to(self._device)
        for start in range(0, len(positions), self.rows_per_step):
            self._count_step(stop)
            cut = slice(start, start + self.rows_per_step)
            with torch.inference_mode():
                logits_NV = self._head(hidden_ND[cut].to(self._head.weight.dtype))[:, : self._vocab_size]
            yield top_k_rows(
                logits_NV, targets_N[cut], positions[cut], top_k=top_k, temperatures=self.identity.temperatures
            )

    @torch.inference_mode()
    def _hidden_states(
        self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], stop: threading.Event
    ) -> Tensor:
        """Return the head's inputs [N, D] for the rows of `positions`: the decoder's outputs one token before each."""
        decoder = self._model.get_decoder()
        before_N = torch.from_numpy(positions.astype(np.int64) - 1).to(self._device)
        # Tokens after the last requested output are not computed.
        ids_1T = torch.from_numpy(token_ids[None, : int(positions[-1])].astype(np.int64)).to(self._device)
        hooks = [layer.register_forward_pre_hook(lambda *_: self._count_step(stop)) for layer in decoder.layers]
        parts, cache = [], None
        try:
            for start in range(0, ids_1T.shape[1], PREFILL_TOKENS):
                output = decoder(
                    input_ids=ids_1T[:, start : start + PREFILL_TOKENS], past_key_values=cache, use_cache=True
                )
                cache = output.past_key_values
                requested_N = before_N[(before_N >= start) & (before_N < start + PREFILL_TOKENS)]
                parts.append(output.last_hidden_state[0, requested_N - start])
            return torch.cat(parts)
        except torch.OutOfMemoryError as error:
            raise LimitExceeded(
                f"{len(token_ids):,} tokens do not fit in the memory of {self._device}; lower the teacher's --max-tokens"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()

    def _count_step(self, stop: threading.Event) -> None:
        if stop.is_set():
            raise _Stopped
        self.progress += 1


class _Stopped(Exception):
    """The request was canceled. Raised on the engine's thread to end the step; it does not propagate further."""


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"there is no device {name!r}; give --device auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device {name}: this machine has {torch.cuda.device_count()} usable GPUs; give --device cpu"
        )
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
    # Transformers initializes missing tensors at random and only warns.
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"the weights in {folder} lack {len(missing)} tensors, the first is {missing[0]}; download the complete model"
        )
    return model


@torch.inference_mode()
def _require_plain_head(model: PreTrainedModel, folder: Path) -> None:
    head = model.get_output_embeddings()
    # Some architectures scale or cap the head's output in `forward`, which scoring bypasses.
    ids_1T = torch.arange(min(4, head.weight.shape[0]), device=model.device)[None]
    whole = model(input_ids=ids_1T, use_cache=False).logits
    parts = head(model.get_decoder()(input_ids=ids_1T, use_cache=False).last_hidden_state)
    if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"the model in {folder} ({model.config.model_type}) changes its head's output, which this engine does not "
            "reproduce; serve a model whose logits are its head's plain output, such as Qwen3-MoE or Qwen3-Next"
        )
