"""Convert vLLM's public `FlatLogprobs` to rows; this works with every release of vLLM."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import ServiceError
from hyperagent.topk import TopKRows


def flat_to_rows(
    flat: Any, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, vocab_size: int
) -> TopKRows:
    """Return the rows of `positions` [N] from the log-probabilities of a whole prompt.

    Args:
        flat: vLLM's `FlatLogprobs`: nothing for the first token, then K + 1 entries per token, the token's own first.
        token_ids: uint32, shape [T]: the prompt.
        positions: uint32, shape [N]: the positions whose rows are returned.
        vocab_size: number of real vocabulary entries.

    Raises:
        ServiceError: `flat` has another layout, a row keeps an id that only pads the vocabulary, or a value is not finite.
    """
    num_rows = len(flat.start_indices) - 1
    entries = len(flat.token_ids) // max(num_rows, 1)
    ids = np.array(flat.token_ids, np.int64).reshape(num_rows, entries)[positions - 1]
    logprobs = np.array(flat.logprobs, np.float32).reshape(num_rows, entries)[positions - 1]
    if not np.array_equal(ids[:, 0], token_ids[positions]):
        raise ServiceError(
            "vLLM's flat logprobs are not laid out as expected; use a release that --capture tensors supports"
        )
    if not np.isfinite(logprobs).all():
        raise ServiceError("the model's logits are not finite; check its weights, or serve it with --dtype float32")
    kept_ids, kept = ids[:, 1:], logprobs[:, 1:]
    if int(kept_ids.max()) >= vocab_size:
        raise ServiceError(
            f"id {int(kept_ids.max())}, which only pads the vocabulary, is among a row's most likely ids; use --capture tensors"
        )
    order = np.lexsort((kept_ids, -kept), axis=1)
    kept = np.take_along_axis(kept, order, axis=1)
    left = 1.0 - np.exp(kept.astype(np.float64)).sum(axis=1)
    # A tail below float32's resolution is lost to rounding, so the resolution is used as its lower bound.
    tail = np.log(np.maximum(left, np.finfo(np.float32).eps))
    return TopKRows(
        positions=positions,
        ids=np.take_along_axis(kept_ids, order, axis=1).astype(np.uint32),
        logprobs=kept,
        tail_logmass=tail.astype(np.float32),
        target_logprob=logprobs[:, 0],
        tail_logsumexps=np.empty((len(positions), 0), np.float32),
    )
