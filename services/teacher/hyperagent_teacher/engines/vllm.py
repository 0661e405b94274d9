"""The engine that runs a model in vLLM: many requests at once, on as many GPUs and nodes as its arguments name.

vLLM's engine runs in a separate process, to which this one sends requests. The capture decides how the rows leave it:

- `tensors` (`vllm_tap.py`): only the requested positions, exact, no Python object per token;
- `flat`: vLLM's public `flat_logprobs`, for releases that the tap does not know. It scores every position, its
  log-probabilities are normalized over the model's padded vocabulary, and its tail is 1 minus the kept probability.

Prefix caching is off: vLLM leaves the rows of cached tokens uninitialized, and rows that depend on earlier requests
could not be reproduced.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import vllm
from numpy.typing import NDArray
from transformers import AutoConfig
from vllm import AsyncEngineArgs, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import ConfigError, NotServing, ServiceError
from hyperagent.identity import TeacherIdentity, weights_fingerprint
from hyperagent.topk import TopKRows
from hyperagent_teacher.engines.base import dtype_name, require_vocabulary
from hyperagent_teacher.engines.topk import require_finite
from hyperagent_teacher.engines.vllm_flat import flat_to_rows
from hyperagent_teacher.engines.vllm_tap import (
    POSITIONS,
    TARGETS,
    TopKTap,
    install_processor,
    require_supported,
)

CaptureMode = Literal["tensors", "flat"]

_ROWS_PER_PART = 512
_V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class VllmEngine:
    """A `ScoringEngine` of a model in vLLM with its tokenizer; created by `load`."""

    def __init__(
        self, arguments: AsyncEngineArgs, identity: TeacherIdentity, capture: CaptureMode, max_tokens: int
    ) -> None:
        self.identity = identity
        self.max_tokens = max_tokens
        # vLLM computes the rows of many requests together, in steps that depend on all of them.
        self.rows_per_step = 1
        self.progress = 0
        self._arguments = arguments
        self._capture = capture
        self._engine: AsyncLLM
        self._stopped = asyncio.Event()
        """Set when the running vLLM engine is abandoned."""

    @classmethod
    async def load(
        cls,
        folder: Path,
        *,
        tokenizer_folder: Path,
        top_k: int,
        max_tokens: int,
        temperatures: Sequence[float] = (),
        dtype: str = "auto",
        head_dtype: str = "auto",
        capture: CaptureMode = "tensors",
        engine_args: Mapping[str, Any] | None = None,
    ) -> VllmEngine:
        """Load the model from a folder of safetensors weights.

        Args:
            top_k: ids per row, the most a request may ask for.
            max_tokens: longest sequence accepted; the model's own limit holds where it is lower.
            temperatures: those other than 1 at which rows are exact, rising; none with the capture "flat".
            dtype: "auto" (the weights' own), "float32", "bfloat16" or "float16".
            head_dtype: dtype of the head's product, "auto" (the model's) or "float32".
            engine_args: further arguments of vLLM's `AsyncEngineArgs`, such as `tensor_parallel_size`.

        Raises:
            ConfigError: a folder, a setting or the combination of model and tokenizer cannot be used.
            ServiceError: vLLM does not start.
        """
        if capture == "tensors":
            require_supported(vllm.__version__)
        elif temperatures:
            raise ConfigError("--capture flat does not give the tails at other temperatures; leave out --temperatures")
        weights = weights_fingerprint(folder)
        tokenizer = ChatTokenizer(tokenizer_folder)
        arguments = _arguments(folder, max_tokens, dtype, head_dtype, capture, engine_args or {})
        model = _checked(arguments, folder)
        require_vocabulary(
            folder, model_vocab_size=model.get_vocab_size(), vocab_size=tokenizer.vocab_size, top_k=top_k
        )
        identity = TeacherIdentity(
            model=folder.resolve().name,
            weights=weights,
            dtype=dtype_name(model.dtype, model.head_dtype),
            backend=f"vllm-{vllm.__version__}" + ("" if capture == "tensors" else f"-{capture}"),
            tokenizer_sha256=tokenizer.identity.tokenizer_sha256,
            template_sha256=tokenizer.identity.template_sha256,
            vocab_size=tokenizer.vocab_size,
            top_k=top_k,
            temperatures=tuple(temperatures),
        )
        # vLLM requires room for one token after the prompt, and the tap's prompt ends before the last position.
        room = 0 if capture == "tensors" else 1
        engine = cls(arguments, identity, capture, min(max_tokens, model.max_model_len - room))
        await engine._start()
        return engine

    async def score(
        self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, top_k: int
    ) -> AsyncGenerator[TopKRows, None]:
        """See `ScoringEngine.score`. A canceled request is aborted in vLLM's engine."""
        last = int(positions[-1])
        prompt = token_ids[: last if self._capture == "tensors" else last + 1]
        output = await self._answer(prompt, self._parameters(token_ids, positions, top_k))
        self.progress += 1
        if output is None or output.prompt_logprobs is None:
            raise ServiceError("vLLM ended the request without its rows; its log says why")
        if output.num_cached_tokens:
            raise ServiceError(
                f"vLLM took {output.num_cached_tokens} tokens from its prefix cache, and their rows are not initialized; "
                "do not enable enable_prefix_caching"
            )
        for rows in self._rows(output.prompt_logprobs, token_ids, positions):
            require_finite(rows)
            yield rows

    async def _answer(self, prompt: NDArray[np.uint32], parameters: SamplingParams) -> RequestOutput | None:
        """Send a request to vLLM and return its final output.

        Raises:
            NotServing: the engine has stopped, or stops before the request is done.
            ServiceError: vLLM did not score the request.
        """

        async def collect() -> RequestOutput | None:
            output = None
            prompt_ids = {"prompt_token_ids": prompt.tolist()}
            stream = self._engine.generate(prompt_ids, parameters, request_id=uuid.uuid4().hex)
            async with aclosing(stream):
                async for part in stream:
                    output = part
            return output

        # vLLM leaves requests waiting for ever when it is shut down.
        collecting, stopping = asyncio.create_task(collect()), asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({collecting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise EngineDeadError
            return collecting.result()
        except EngineDeadError as error:
            raise NotServing("the teacher's engine has stopped and is being restarted; try again later") from error
        except (EngineGenerateError, ValueError) as error:
            raise ServiceError(f"vLLM did not score the request: {' '.join(str(error).split())}") from error
        finally:
            for task in (collecting, stopping):
                task.cancel()
            await asyncio.gather(collecting, stopping, return_exceptions=True)

    async def restart(self) -> None:
        """See `ScoringEngine.restart`: kill vLLM's engine process and start a new one."""
        self._stopped.set()
        await asyncio.to_thread(self._engine.shutdown, 0.0)
        await self._start()

    def close(self) -> None:
        """End vLLM's engine process."""
        self._engine.shutdown()

    async def _start(self) -> None:
        self._stopped = asyncio.Event()
        try:
            # In a thread, since it takes half a minute, during which the event loop has to answer health checks.
            self._engine = await asyncio.to_thread(AsyncLLM.from_engine_args, self._arguments)
            if self._capture == "tensors":
                install_processor()
                await self._engine.collective_rpc(
                    "install_top_k_tap", args=(self.identity.vocab_size, self.identity.temperatures)
                )
        except (RuntimeError, ValueError, OSError) as error:
            raise ServiceError(f"vLLM does not start: {' '.join(str(error).split())}; its log says why") from error

    def _parameters(self, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], top_k: int) -> SamplingParams:
        common: dict[str, Any] = {
            "prompt_logprobs": top_k,
            "max_tokens": 1,
            "temperature": 0.0,
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        if self._capture == "flat":
            return SamplingParams(**common, flat_logprobs=True)
        wanted = {
            POSITIONS: positions.astype("<u4", copy=False).tobytes(),
            TARGETS: token_ids[positions].astype("<u4", copy=False).tobytes(),
        }
        return SamplingParams(**common, extra_args=wanted)

    def _rows(self, captured: Any, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32]) -> Iterator[TopKRows]:
        """Yield vLLM's rows in parts: one copy of all rows would spend more time on fresh memory pages than on copying."""
        cuts = [slice(start, start + _ROWS_PER_PART) for start in range(0, len(positions), _ROWS_PER_PART)]
        if self._capture == "flat":
            rows = flat_to_rows(captured, token_ids, positions, vocab_size=self.identity.vocab_size)
            yield from (rows.part(cut) for cut in cuts)
            return
        for cut in cuts:
            yield TopKRows(
                positions=positions[cut],
                ids=captured.ids[cut].astype(np.uint32),
                logprobs=np.ascontiguousarray(captured.logprobs[cut]),
                tail_logmass=captured.tail_logmass[cut],
                target_logprob=captured.target_logprob[cut],
                tail_logsumexps=np.ascontiguousarray(captured.tail_logsumexps[cut]),
            )


def _arguments(
    folder: Path,
    max_tokens: int,
    dtype: str,
    head_dtype: str,
    capture: CaptureMode,
    given: Mapping[str, Any],
) -> AsyncEngineArgs:
    config = _config(folder)
    ours: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        # vLLM's own "auto" would halve float32.
        "dtype": str(config.dtype or "auto").removeprefix("torch.") if dtype == "auto" else dtype,
        # The number of log-probabilities is checked before a request reaches vLLM.
        "max_logprobs": -1,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "max_model_len": min(max_tokens, config.max_position_embeddings),
    }
    if head_dtype != "auto":
        ours["hf_overrides"] = {"head_dtype": head_dtype}
    if capture == "tensors":
        # The tap exists for vLLM's first model runner, which serves CPUs and GPUs alike.
        if os.environ.setdefault(_V2_RUNNER, "0") != "0":
            raise ConfigError(f"the tap needs vLLM's first model runner; unset {_V2_RUNNER}, or give --capture flat")
        ours["worker_extension_cls"] = f"{TopKTap.__module__}.{TopKTap.__qualname__}"
    if both := sorted(ours.keys() & given.keys()):
        raise ConfigError(f"--engine-args may not set {', '.join(both)}, because the teacher sets it; leave it out")
    try:
        return AsyncEngineArgs(**ours, **given)
    except TypeError as error:
        raise ConfigError(f"vLLM does not accept --engine-args: {error}; give arguments of AsyncEngineArgs") from error


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load a model from {folder}: {' '.join(str(error).split())}") from error


def _checked(arguments: AsyncEngineArgs, folder: Path) -> Any:
    try:
        return arguments.create_model_config()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"vLLM cannot load a model from {folder}: {' '.join(str(error).split())}") from error
