"""The private seam into vLLM: a request's top-k rows leave the engine as tensors, with no Python object per token.

Stock vLLM scores every position of a prompt, over the padded vocabulary, and turns the result into a dictionary (or
flat lists) token by token. A request that carries `POSITIONS` is treated otherwise, on both sides of vLLM:

- in each worker, `TopKTap` scores only the positions asked for, some rows at a time, over the real vocabulary, with
  ties broken by id and the exact mass of what is left out (`engines.topk.top_k_tensors`);
- in the process that asks, `TensorProcessor` hands the tensors on as they came.

Requests without `POSITIONS` are vLLM's own, as ever. What is private to vLLM is named here and nowhere else:
`GPUModelRunner._get_prompt_logprobs_dict` (v1/worker/gpu_model_runner.py, also the CPU's) and `LogprobsProcessor`
(v1/engine/logprobs.py). Both change between releases, hence `SUPPORTED_VERSIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.engine import EngineCoreRequest, output_processor
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors

from hyperagent.errors import ConfigError
from hyperagent_teacher.engines.topk import top_k_tensors

SUPPORTED_VERSIONS = ("0.32.0",)
"""Releases that the contract test (tests/vllm/test_vllm_contract.py) has passed with."""

POSITIONS = "hyperagent_positions"
"""Key in `SamplingParams.extra_args`: the positions to score, packed little-endian uint32, as in `ScoringEngine`. The
prompt ends before the last of them, whose token need not be computed."""
TARGETS = "hyperagent_targets"
"""Likewise: the actual tokens there."""

MAX_LOGITS_PER_CHUNK = 1 << 27
"""Numbers in one chunk of logits: 512 MiB in float32, 883 rows of Qwen's vocabulary."""


def require_supported(version: str) -> None:
    """Refuse a vLLM whose insides nobody has looked at.

    Raises:
        ConfigError: naming the releases that are known and the way around.
    """
    # A build for a kind of machine adds a local part, such as 0.32.0+cpu.
    if version.partition("+")[0] not in SUPPORTED_VERSIONS:
        raise ConfigError(
            f"vLLM {version} is not one whose internals this release knows ({', '.join(SUPPORTED_VERSIONS)}); install "
            f"vllm=={SUPPORTED_VERSIONS[-1]}, or serve with --capture flat, which uses vLLM's public interface and is slower"
        )


class TopKTap:
    """Mixed into vLLM's worker (`worker_extension_cls`); `collective_rpc("install_top_k_tap", ...)` turns it on."""

    model_runner: Any

    def install_top_k_tap(self, vocab_size: int, temperatures: Sequence[float]) -> str:
        """Put the tap in place of the runner's own prompt scoring; returns the runner's class name.

        Args:
            vocab_size: real vocabulary entries; ids at or above it are cut off before anything is normalized.
            temperatures: those besides 1 at which the tail's log-sum-exp is wanted.
        """
        runner = self.model_runner
        stock = runner._get_prompt_logprobs_dict

        def tapped(hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, LogprobsTensors | None]:
            ours, others = _split_by_kind(runner)
            runner.num_prompt_logprobs = others
            finished: dict[str, LogprobsTensors | None] = stock(hidden_states, num_scheduled_tokens)
            for request_id, top_k in list(ours.items()):
                num_tokens = num_scheduled_tokens.get(request_id)
                if num_tokens is None:  # preempted: it starts again later
                    continue
                tensors = _score_step(
                    runner, request_id, hidden_states, num_tokens,
                    top_k=top_k, vocab_size=vocab_size, temperatures=temperatures,
                )  # fmt: skip
                if tensors is not None:
                    finished[request_id] = tensors
                    del ours[request_id]
            runner.num_prompt_logprobs = {**others, **ours}
            if finished:
                runner._sync_device()
            return finished

        runner._get_prompt_logprobs_dict = tapped
        return type(runner).__name__


def _split_by_kind(runner: Any) -> tuple[dict[str, int], dict[str, int]]:
    ours: dict[str, int] = {}
    others: dict[str, int] = {}
    for request_id, top_k in runner.num_prompt_logprobs.items():
        arguments = runner.requests[request_id].sampling_params.extra_args or {}
        (ours if POSITIONS in arguments else others)[request_id] = top_k
    return ours, others


def _score_step(
    runner: Any,
    request_id: str,
    hidden_states: Tensor,
    num_tokens: int,
    *,
    top_k: int,
    vocab_size: int,
    temperatures: Sequence[float],
) -> LogprobsTensors | None:
    """Score what one step of prefill has computed of a request's wanted positions; all of them, once it is over."""
    request = runner.requests[request_id]
    arguments = request.sampling_params.extra_args
    positions, targets = (np.frombuffer(arguments[key], "<u4").astype(np.int64) for key in (POSITIONS, TARGETS))
    tensors: LogprobsTensors | None = request.in_progress_prompt_logprobs_cpu
    if tensors is None:
        tensors = LogprobsTensors.empty_cpu(len(positions), 1 + top_k + len(temperatures))
        request.in_progress_prompt_logprobs_cpu = tensors
    start = request.num_computed_tokens
    # The row of position p is made from the output at p - 1.
    first, last = np.searchsorted(positions, (start + 1, start + num_tokens + 1)).tolist()
    offset = runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]].item()
    rows_per_chunk = max(1, MAX_LOGITS_PER_CHUNK // vocab_size)
    for begin in range(first, last, rows_per_chunk):
        cut = slice(begin, min(begin + rows_per_chunk, last))
        rows_N = torch.from_numpy(offset + positions[cut] - 1 - start).to(hidden_states.device)
        targets_N = torch.from_numpy(targets[cut]).to(hidden_states.device)
        logits_NV = runner.model.compute_logits(hidden_states[rows_N])[:, :vocab_size]
        kept = top_k_tensors(logits_NV, targets_N, top_k=top_k, temperatures=temperatures)
        tensors.logprob_token_ids[cut, 1 : 1 + top_k].copy_(kept.ids_NK, non_blocking=True)
        tensors.logprobs[cut, 1 : 1 + top_k].copy_(kept.logprobs_NK, non_blocking=True)
        tensors.logprobs[cut, 1 + top_k :].copy_(kept.tails_NM, non_blocking=True)
        tensors.logprobs[cut, 0].copy_(kept.target_N, non_blocking=True)
        # Of the three tensors that vLLM carries, the ranks are the one we have no use for: its bits are the tail's.
        tensors.selected_token_ranks[cut].copy_(kept.tail_N.view(torch.int32), non_blocking=True)
    if start + num_tokens < len(request.prompt_token_ids):
        return None
    request.in_progress_prompt_logprobs_cpu = None
    return tensors


@dataclass(frozen=True, eq=False)
class CapturedRows:
    """What a tapped request gets as its `RequestOutput.prompt_logprobs`; N positions, K ids each, M temperatures."""

    ids: NDArray[np.int32]
    """[N, K]."""
    logprobs: NDArray[np.float32]
    """[N, K]."""
    tail_logmass: NDArray[np.float32]
    """[N]."""
    target_logprob: NDArray[np.float32]
    """[N]."""
    tail_logsumexps: NDArray[np.float32]
    """[N, M]."""


class TensorProcessor(LogprobsProcessor):
    """vLLM's `LogprobsProcessor`, which keeps the tensors of a tapped request as they are."""

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: EngineCoreRequest) -> LogprobsProcessor:
        """Make the processor of one request: this one if it is tapped, otherwise vLLM's own."""
        parameters = request.sampling_params
        is_tapped = parameters is not None and POSITIONS in (parameters.extra_args or {})
        # The inherited method makes an instance of the class it is called on.
        processor: LogprobsProcessor
        if is_tapped:
            processor = super().from_new_request(tokenizer, request)
        else:
            processor = LogprobsProcessor.from_new_request(tokenizer, request)
        return processor

    def _update_prompt_logprobs(self, prompt_logprobs_tensors: LogprobsTensors) -> None:
        ids, logprobs, tail_bits, *_ = prompt_logprobs_tensors
        values, end = logprobs.numpy(), 1 + self.num_prompt_logprobs
        self.prompt_logprobs = CapturedRows(
            ids.numpy()[:, 1:end],
            values[:, 1:end],
            tail_bits.view(torch.float32).numpy(),
            values[:, 0],
            values[:, end:],
        )


def install_processor() -> None:
    """Have the engines of this process keep tapped requests' tensors."""
    output_processor.LogprobsProcessor = TensorProcessor
