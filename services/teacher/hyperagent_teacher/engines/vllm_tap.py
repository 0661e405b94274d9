"""Patch vLLM's internals so that a request's top-k rows leave the engine as tensors, with no Python object per token.

Unpatched vLLM scores every position of a prompt, over the padded vocabulary, and turns the result into a dictionary (or
flat lists) token by token. A request that carries `POSITIONS` is handled differently, on both sides of vLLM:

- in each worker, `TopKTap` scores only the positions asked for, some rows at a time, over the real vocabulary, with
  ties broken by id and the exact mass of what is left out (`engines.topk.top_k_tensors`);
- in the process that asks, `TensorProcessor` hands the tensors on as they came.

Requests without `POSITIONS` are handled by vLLM itself. This module is the only one that uses vLLM's private names:
`GPUModelRunner._get_prompt_logprobs_dict` (v1/worker/gpu_model_runner.py, also used on CPUs) and `LogprobsProcessor`
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
"""Releases of vLLM that pass the contract test (tests/vllm/test_vllm_contract.py)."""

POSITIONS = "hyperagent_positions"
"""Key in `SamplingParams.extra_args`: the positions to score, packed as little-endian uint32, as in `ScoringEngine`. The
prompt ends before the last position, whose token does not have to be computed."""
TARGETS = "hyperagent_targets"
"""Likewise: the actual tokens there."""

MAX_LOGITS_PER_CHUNK = 1 << 27
"""Number of logits in one chunk: 512 MiB in float32, 883 rows of Qwen's vocabulary."""


def require_supported(version: str) -> None:
    """Refuse a release of vLLM whose internals the tap was not tested with.

    Raises:
        ConfigError: the release is not supported; the message names the supported ones and the alternative.
    """
    # Builds for special hardware add a local version, such as 0.32.0+cpu.
    if version.partition("+")[0] not in SUPPORTED_VERSIONS:
        raise ConfigError(
            f"vLLM {version} is not a release that the tap supports ({', '.join(SUPPORTED_VERSIONS)}); install "
            f"vllm=={SUPPORTED_VERSIONS[-1]}, or serve with --capture flat, which uses vLLM's public interface and is slower"
        )


class TopKTap:
    """Extension of vLLM's worker (`worker_extension_cls`), enabled with `collective_rpc("install_top_k_tap", ...)`."""

    model_runner: Any

    def install_top_k_tap(self, vocab_size: int, temperatures: Sequence[float]) -> str:
        """Replace the runner's own prompt scoring with the tap and return the runner's class name.

        Args:
            vocab_size: number of real vocabulary entries; ids at or above it are cut off before normalization.
            temperatures: those other than 1 at which the tail's log-sum-exp is computed.
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
    """Score the requested positions that one step of prefill has computed; return all rows after the last step, else None."""
    request = runner.requests[request_id]
    arguments = request.sampling_params.extra_args
    positions, targets = (np.frombuffer(arguments[key], "<u4").astype(np.int64) for key in (POSITIONS, TARGETS))
    tensors: LogprobsTensors | None = request.in_progress_prompt_logprobs_cpu
    if tensors is None:
        tensors = LogprobsTensors.empty_cpu(len(positions), 1 + top_k + len(temperatures))
        request.in_progress_prompt_logprobs_cpu = tensors
    start = request.num_computed_tokens
    # The row of position p is computed from the output at p - 1.
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
        # vLLM carries three tensors per request. The ranks are not needed here, so they carry the bits of the tail.
        tensors.selected_token_ranks[cut].copy_(kept.tail_N.view(torch.int32), non_blocking=True)
    if start + num_tokens < len(request.prompt_token_ids):
        return None
    request.in_progress_prompt_logprobs_cpu = None
    return tensors


@dataclass(frozen=True, eq=False)
class CapturedRows:
    """The `RequestOutput.prompt_logprobs` of a tapped request: N positions, K ids each, M temperatures."""

    ids: NDArray[np.int32]
    """Kept ids, shape [N, K]."""
    logprobs: NDArray[np.float32]
    """Log-probabilities of the kept ids, shape [N, K]."""
    tail_logmass: NDArray[np.float32]
    """Log of the probability outside the kept ids, shape [N]."""
    target_logprob: NDArray[np.float32]
    """Log-probability of the actual token, shape [N]."""
    tail_logsumexps: NDArray[np.float32]
    """See `hyperagent.topk.TopKRows.tail_logsumexps`, shape [N, M]."""


class TensorProcessor(LogprobsProcessor):
    """A `LogprobsProcessor` of vLLM that keeps the tensors of a tapped request unchanged."""

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: EngineCoreRequest) -> LogprobsProcessor:
        """Create the processor of one request: this class if the request is tapped, otherwise vLLM's own."""
        parameters = request.sampling_params
        is_tapped = parameters is not None and POSITIONS in (parameters.extra_args or {})
        # The inherited method creates an instance of the class it is called on.
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
    """Make the engines of this process keep the tensors of tapped requests."""
    output_processor.LogprobsProcessor = TensorProcessor
