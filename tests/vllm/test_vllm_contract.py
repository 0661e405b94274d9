"""Compare the tap with unpatched vLLM and with the Transformers engine, on a real vLLM.

The unpatched rows come from the same engine, whose tap does not touch ordinary requests; they are normalized over the
padded vocabulary, so they are compared after the padding's share has been removed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm_world import MAX_TOKENS, NUM_TOKENS, TEMPERATURES, TOP_K, Load, score_all, sequence

from hyperagent.errors import ConfigError, ServiceError
from hyperagent.topk import TopKRows
from hyperagent_teacher.engines.transformers import TransformersEngine
from hyperagent_teacher.engines.vllm import VllmEngine
from hyperagent_teacher.engines.vllm_tap import SUPPORTED_VERSIONS, require_supported

MODEL_VOCAB_SIZE = 512


async def stock_logprobs(engine: VllmEngine, token_ids: NDArray[np.uint32], real: int) -> NDArray[np.float64]:
    """Return log-probabilities [T - 1, V] over the real vocabulary from vLLM's own prompt_logprobs of all ids."""
    parameters = SamplingParams(
        prompt_logprobs=-1, max_tokens=1, detokenize=False, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    stream = engine._engine.generate({"prompt_token_ids": token_ids.tolist()}, parameters, request_id="stock")
    output = [part async for part in stream][-1]
    flat = output.prompt_logprobs
    rows = len(token_ids) - 1
    ids = np.array(flat.token_ids).reshape(rows, -1)[:, 1:]
    values = np.array(flat.logprobs).reshape(rows, -1)[:, 1:]
    whole = np.full((rows, MODEL_VOCAB_SIZE), np.nan)
    np.put_along_axis(whole, ids, values, axis=1)
    assert np.isfinite(whole).all()
    cut = whole[:, :real]
    return cut - np.logaddexp.reduce(cut, axis=1, keepdims=True)


@asynccontextmanager
async def loaded(load: Load, name: str, **settings: Any) -> AsyncIterator[VllmEngine]:
    engine = await load(name, **settings)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "p50", "p99"),
    [("qwen3", 1e-5, 2e-5), ("qwen3_moe", 1e-5, 2e-5), ("qwen3_next", 0.05, 0.5)],
)
async def test_rows_equal_stock_vllms_and_are_close_to_the_transformers_engines(
    name: str, p50: float, p99: float, load: Load, model_folders: dict[str, Path]
) -> None:
    async with loaded(load, name) as engine:
        vocab_size = engine.identity.vocab_size
        assert vocab_size < MODEL_VOCAB_SIZE
        token_ids, positions = sequence(vocab_size)
        stock = (await stock_logprobs(engine, token_ids, vocab_size))[positions - 1]
        rows = await score_all(engine, token_ids, positions)
        rows.validate(num_tokens=NUM_TOKENS, vocab_size=vocab_size, temperatures=TEMPERATURES)
        # Other requests of the batch and earlier requests change nothing beyond rounding.
        others = [score_all(engine, *sequence(vocab_size, seed)) for seed in (1, 2, 3)]
        again, *_ = await asyncio.gather(score_all(engine, token_ids, positions), *others)
    assert_equal_on_untied_ranks(rows, stock, atol=2e-5)
    target = stock[np.arange(len(positions)), token_ids[positions]]
    np.testing.assert_allclose(rows.target_logprob, target, atol=2e-5)
    tail = np.log1p(-np.exp(np.take_along_axis(stock, rows.ids.astype(np.int64), 1)).sum(1))
    np.testing.assert_allclose(np.exp(rows.tail_logmass), np.exp(tail), atol=1e-5)
    rest = stock.copy()
    np.put_along_axis(rest, rows.ids.astype(np.int64), -np.inf, axis=1)
    tails = [np.logaddexp.reduce(rest / temperature, axis=1) for temperature in TEMPERATURES]
    np.testing.assert_allclose(rows.tail_logsumexps, np.stack(tails, axis=1), atol=1e-4)

    folder = model_folders[name]
    reference = TransformersEngine(folder, tokenizer_folder=folder, top_k=TOP_K, max_tokens=MAX_TOKENS)
    expected = await score_all(reference, token_ids, positions)
    reference.close()
    # The maximum is not a useful measure: in bfloat16 a router near a tie sends a token to another expert, which changes
    # the whole row. The difference between Transformers in bfloat16 and in float32 is as large.
    for other in (expected, again):
        difference = np.abs(rows.target_logprob - other.target_logprob)
        assert np.quantile(difference, 0.5) <= p50
        assert np.quantile(difference, 0.99) <= p99
    overlap = np.mean([np.isin(a, b).mean() for a, b in zip(rows.ids, expected.ids, strict=True)])
    assert overlap >= (0.999 if p50 < 1e-4 else 0.9)


def assert_equal_on_untied_ranks(rows: TopKRows, stock: NDArray[np.float64], *, atol: float) -> None:
    order = np.argsort(-stock, axis=1, kind="stable")[:, : TOP_K + 1]
    values = np.take_along_axis(stock, order, 1)
    np.testing.assert_allclose(rows.logprobs, values[:, :TOP_K], atol=atol)
    gaps = -np.diff(values, axis=1) > 2 * atol
    untied = gaps & np.concatenate([np.ones((len(gaps), 1), bool), gaps[:, :-1]], axis=1)
    assert untied.mean() > 0.5
    assert (rows.ids == order[:, :TOP_K])[untied].all()


async def test_the_public_interface_gives_the_same_rows_where_no_id_pads_the_vocabulary(load: Load) -> None:
    async with loaded(load, "unpadded") as tapped:
        token_ids, positions = sequence(tapped.identity.vocab_size)
        expected = await score_all(tapped, token_ids, positions)
    async with loaded(load, "unpadded", capture="flat", temperatures=()) as engine:
        assert engine.identity.backend == tapped.identity.backend + "-flat"
        rows = await score_all(engine, token_ids, positions)
    rows.validate(num_tokens=NUM_TOKENS, vocab_size=engine.identity.vocab_size)
    np.testing.assert_allclose(rows.logprobs, expected.logprobs, atol=2e-5)
    np.testing.assert_allclose(rows.target_logprob, expected.target_logprob, atol=2e-5)
    np.testing.assert_allclose(np.exp(rows.tail_logmass), np.exp(expected.tail_logmass), atol=2e-5)


async def test_the_public_interface_refuses_rows_that_keep_padding(load: Load) -> None:
    async with loaded(load, "qwen3", capture="flat", temperatures=()) as engine:
        with pytest.raises(ServiceError, match="only pads the vocabulary"):
            await score_all(engine, *sequence(engine.identity.vocab_size))


async def test_aborted_requests_leave_the_engine(load: Load) -> None:
    async with loaded(load, "qwen3") as engine:
        token_ids, positions = sequence(engine.identity.vocab_size)
        chance = random.Random(0)
        for _ in range(20):
            tasks = [asyncio.create_task(score_all(engine, token_ids, positions)) for _ in range(10)]
            await asyncio.sleep(chance.uniform(0, 0.1))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        async with asyncio.timeout(30):
            while engine._engine.get_num_unfinished_requests():
                await asyncio.sleep(0.05)
        assert (await score_all(engine, token_ids, positions)).num_rows == 400


async def test_a_head_in_float32_is_another_identity(load: Load) -> None:
    async with loaded(load, "qwen3_next", head_dtype="float32") as engine:
        assert engine.identity.dtype == "bfloat16, head float32"
        token_ids, positions = sequence(engine.identity.vocab_size)
        rows = await score_all(engine, token_ids, positions)
    ties = (np.diff(rows.logprobs, axis=1) == 0).any(axis=1).mean()
    assert ties < 0.05


@pytest.mark.parametrize(
    ("engine_args", "words"),
    [
        ({"max_num_batched_token": 1}, "max_num_batched_token"),
        ({"enable_prefix_caching": True}, "may not set enable_prefix_caching"),
    ],
)
async def test_engine_arguments_that_cannot_be_met_are_one_sentence(
    engine_args: dict[str, Any], words: str, load: Load
) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        await load("qwen3", engine_args=engine_args)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.33.0", "1.0"])
def test_another_release_is_refused_with_the_way_around(version: str) -> None:
    with pytest.raises(ConfigError, match="--capture flat") as refusal:
        require_supported(version)
    assert version in str(refusal.value)
    assert "\n" not in str(refusal.value)
    for known in SUPPORTED_VERSIONS:
        require_supported(known)
        require_supported(known + "+cpu")
