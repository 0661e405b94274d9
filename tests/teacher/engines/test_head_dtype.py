"""Test a float32 head on a bfloat16 model: its product and its name in the identity."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from hyperagent.topk import TopKRows, concatenate
from hyperagent_teacher.engines.transformers import TransformersEngine

TOP_K = 16


async def rows_of(
    folder: Path, head_dtype: str, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32]
) -> tuple[str, TopKRows]:
    """Return the identity's dtype and the rows."""
    engine = TransformersEngine(
        folder,
        tokenizer_folder=folder,
        top_k=TOP_K,
        max_tokens=64,
        dtype="bfloat16",
        head_dtype=head_dtype,
        device="cpu",
    )
    try:
        async with aclosing(engine.score(token_ids, positions, top_k=TOP_K)) as parts:
            return engine.identity.dtype, concatenate([part async for part in parts])
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_next"])
async def test_a_float32_head_multiplies_in_float32(
    name: str, model_folders: dict[str, Path], sequence: tuple[NDArray[np.uint32], NDArray[np.uint32]]
) -> None:
    folder, (token_ids, positions) = model_folders[name], sequence
    dtype, exact = await rows_of(folder, "float32", token_ids, positions)
    own_dtype, rounded = await rows_of(folder, "auto", token_ids, positions)
    assert (dtype, own_dtype) == ("bfloat16, head float32", "bfloat16")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        hidden = model.get_decoder()(torch.from_numpy(token_ids.astype(np.int64))[None]).last_hidden_state[0]
        logits = hidden.double() @ model.get_output_embeddings().weight.double().T
    real = logits[torch.from_numpy(positions.astype(np.int64)) - 1]

    def error(rows: TopKRows) -> float:
        """Return the largest error of a difference of two kept log-probabilities, in which the other ids cancel."""
        wanted = real.gather(1, torch.from_numpy(rows.ids.astype(np.int64))).numpy()
        return float(np.abs(np.diff(rows.logprobs.astype(np.float64)) - np.diff(wanted)).max())

    assert error(exact) < 1e-4
    assert error(rounded) > 1e-2
