"""Compare the engine with a float64 oracle that keeps all logits."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, CohereConfig

from hyperagent.errors import ConfigError, InvalidRequest, LimitExceeded, ServiceError
from hyperagent.identity import weights_fingerprint
from hyperagent.topk import TopKRows, concatenate
from hyperagent_teacher.engines import transformers
from hyperagent_teacher.engines.base import require_scorable
from hyperagent_teacher.engines.topk import top_k_rows
from hyperagent_teacher.engines.transformers import MAX_ROWS_PER_CHUNK, TransformersEngine

Sequence = tuple[NDArray[np.uint32], NDArray[np.uint32]]


async def score_all(engine: TransformersEngine, token_ids: Any, positions: Any, top_k: int) -> list[TopKRows]:
    async with aclosing(engine.score(token_ids, positions, top_k=top_k)) as parts:
        return [part async for part in parts]


def oracle_logprobs(folder: Path, token_ids: NDArray[np.uint32], vocab_size: int) -> NDArray[np.float64]:
    """Return log-probabilities [T, V]: row t is the distribution of the token after t."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(token_ids.astype(np.int64)[None])).logits[0].double().numpy()
    real = logits[:, :vocab_size]
    return real - np.log(np.exp(real - real.max(1, keepdims=True)).sum(1, keepdims=True)) - real.max(1, keepdims=True)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize(("top_k", "prefill_tokens"), [(1, 2048), (16, 2048), (16, 1), (16, 7), (16, 59)])
async def test_rows_equal_a_sort_of_the_whole_distribution(
    name: str,
    top_k: int,
    prefill_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
    engines: dict[str, TransformersEngine],
    model_folders: dict[str, Path],
    sequence: Sequence,
) -> None:
    monkeypatch.setattr(transformers, "PREFILL_TOKENS", prefill_tokens)
    engine, (token_ids, positions) = engines[name], sequence
    rows = concatenate(await score_all(engine, token_ids, positions, top_k))

    vocab_size, temperatures = engine.identity.vocab_size, engine.identity.temperatures
    assert vocab_size < 512
    assert temperatures == (0.5, 2.0)
    whole = oracle_logprobs(model_folders[name], token_ids, vocab_size)[positions.astype(int) - 1]
    order = np.argsort(-whole, axis=1, kind="stable")
    kept, rest = order[:, :top_k], order[:, top_k:]
    np.testing.assert_array_equal(rows.positions, positions)
    np.testing.assert_array_equal(rows.ids, kept)
    np.testing.assert_allclose(rows.logprobs, np.take_along_axis(whole, kept, 1), atol=2e-5)
    tail = np.log(np.exp(np.take_along_axis(whole, rest, 1)).sum(1))
    np.testing.assert_allclose(rows.tail_logmass, tail, atol=2e-5)
    for column, temperature in enumerate(temperatures):
        tail = np.log(np.exp(np.take_along_axis(whole, rest, 1) / temperature).sum(1))
        np.testing.assert_allclose(rows.tail_logsumexps[:, column], tail, atol=2e-5 * max(1, 1 / temperature))
    target = whole[np.arange(len(positions)), token_ids[positions]]
    np.testing.assert_allclose(rows.target_logprob, target, atol=2e-5)
    rows.validate(num_tokens=len(token_ids), vocab_size=vocab_size, temperatures=temperatures)


async def test_a_long_sequence_comes_in_chunks_in_order(
    engine: TransformersEngine, model_folders: dict[str, Path]
) -> None:
    token_ids = np.random.default_rng(1).integers(0, engine.identity.vocab_size, 1500).astype(np.uint32)
    positions = np.arange(1, 1500, dtype=np.uint32)
    parts = await score_all(engine, token_ids, positions, 4)
    assert [part.num_rows for part in parts] == [MAX_ROWS_PER_CHUNK, 1499 - MAX_ROWS_PER_CHUNK]
    rows = concatenate(parts)
    np.testing.assert_array_equal(rows.positions, positions)
    whole = oracle_logprobs(model_folders["qwen3_moe"], token_ids, engine.identity.vocab_size)
    np.testing.assert_allclose(rows.target_logprob, whole[np.arange(1499), token_ids[1:]], atol=5e-5)


async def test_rows_of_an_engine_that_keeps_the_whole_vocabulary_have_no_tail(
    model_folders: dict[str, Path], engine: TransformersEngine, sequence: Sequence
) -> None:
    folder, vocab_size = model_folders["qwen3_moe"], engine.identity.vocab_size
    whole = TransformersEngine(folder, tokenizer_folder=folder, top_k=vocab_size, max_tokens=64, temperatures=[2.0])
    rows = concatenate(await score_all(whole, *sequence, vocab_size))
    whole.close()
    assert (rows.tail_logmass == -np.inf).all()
    assert (rows.tail_logsumexps == -np.inf).all()
    assert (np.sort(rows.ids, axis=1) == np.arange(vocab_size)).all()
    rows.validate(num_tokens=60, vocab_size=vocab_size, temperatures=[2.0])


@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_ties_are_broken_by_id(top_k: int) -> None:
    logits = torch.randint(0, 4, (50, 40), generator=torch.Generator().manual_seed(0)).float()
    targets, positions = torch.zeros(50, dtype=torch.int64), np.arange(1, 51, dtype=np.uint32)
    rows = top_k_rows(logits, targets, positions, top_k=top_k, temperatures=())
    ids = np.tile(np.arange(40), (50, 1))
    np.testing.assert_array_equal(rows.ids, np.lexsort((ids, -logits.numpy()))[:, :top_k])


def test_the_tail_keeps_its_digits_when_the_kept_ids_hold_nearly_everything() -> None:
    logits = torch.tensor([[0.0, -60.0, -61.0]])
    target, position = torch.zeros(1, dtype=torch.int64), np.array([1], np.uint32)
    rows = top_k_rows(logits, target, position, top_k=1, temperatures=(0.1, 4.0))
    np.testing.assert_allclose(rows.tail_logmass, [np.logaddexp(-60.0, -61.0)], rtol=1e-6)
    tails = [[np.logaddexp(-600.0, -610.0), np.logaddexp(-15.0, -15.25)]]
    np.testing.assert_allclose(rows.tail_logsumexps, tails, rtol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(ServiceError, match="not finite"):
        top_k_rows(
            logits, torch.zeros(3, dtype=torch.int64), np.arange(1, 4, dtype=np.uint32), top_k=2, temperatures=()
        )


def test_identity_names_what_decides_the_numbers(
    engine: TransformersEngine, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = model_folders["qwen3_moe"]
    assert engine.identity.weights == weights_fingerprint(folder)
    assert (engine.identity.model, engine.identity.dtype, engine.identity.top_k) == ("qwen3_moe", "float32", 16)
    halved = TransformersEngine(folder, tokenizer_folder=folder, top_k=16, max_tokens=64, dtype="bfloat16")
    halved.close()
    assert halved.identity.dtype == "bfloat16"
    assert halved.identity.fingerprint != engine.identity.fingerprint


async def test_a_head_in_float32_multiplies_what_the_body_gives_in_float32(
    model_folders: dict[str, Path], sequence: Sequence
) -> None:
    folder, (token_ids, positions) = model_folders["qwen3_moe"], sequence
    rows = {}
    for head_dtype in ("auto", "float32"):
        engine = TransformersEngine(
            folder, tokenizer_folder=folder, top_k=16, max_tokens=64, dtype="bfloat16", head_dtype=head_dtype
        )
        rows[head_dtype] = concatenate(await score_all(engine, token_ids, positions, 16))
        engine.close()
        assert engine.identity.dtype == ("bfloat16" if head_dtype == "auto" else "bfloat16, head float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        hidden = model.get_decoder()(torch.from_numpy(token_ids.astype(np.int64)[None])).last_hidden_state[0]
        logits = hidden.double() @ model.get_output_embeddings().weight.double().T
    oracle = logits[:, : engine.identity.vocab_size].log_softmax(dim=1).numpy()
    target = oracle[positions.astype(int) - 1, token_ids[positions]]
    np.testing.assert_allclose(rows["float32"].target_logprob, target, atol=1e-5)
    # The product in bfloat16 is off by far more than that, so the two cannot be confused.
    assert np.abs(rows["auto"].target_logprob - target).max() > 1e-3


def test_the_models_own_limit_holds_where_it_is_lower(model_folders: dict[str, Path]) -> None:
    folder = model_folders["qwen3_moe"]
    engine = TransformersEngine(folder, tokenizer_folder=folder, top_k=16, max_tokens=131_072)
    engine.close()
    assert engine.max_tokens == 4096


TOKENS = np.arange(60, dtype=np.uint32)


@pytest.mark.parametrize(
    ("token_ids", "positions", "top_k", "error", "words"),
    [
        (np.zeros(2049, np.uint32), [5, 6], 4, LimitExceeded, "2,049 tokens"),
        (TOKENS, [5, 6], 17, InvalidRequest, "top_k"),
        (TOKENS, [5, 6], 0, InvalidRequest, "top_k"),
        (np.append(TOKENS, np.uint32(511)), [5, 6], 4, InvalidRequest, "token id 511"),
        (TOKENS, [], 4, InvalidRequest, "no position"),
        (TOKENS, [6, 5], 4, InvalidRequest, "increase strictly"),
        (TOKENS, [5, 5], 4, InvalidRequest, "increase strictly"),
        (TOKENS, [0, 1], 4, InvalidRequest, "increase strictly"),
        (TOKENS, [5, 60], 4, InvalidRequest, "increase strictly"),
        (TOKENS[:0], [5], 4, InvalidRequest, "no token"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    token_ids: NDArray[np.uint32],
    positions: list[int],
    top_k: int,
    error: type[Exception],
    words: str,
    engine: TransformersEngine,
) -> None:
    with pytest.raises(error, match=words):
        require_scorable(engine, token_ids, np.array(positions, np.uint32), top_k=top_k)


def test_what_can_be_scored_is_accepted(engine: TransformersEngine, sequence: Sequence) -> None:
    require_scorable(engine, *sequence, top_k=16)


async def test_cancelling_stops_the_model_within_a_layer(
    engines: dict[str, TransformersEngine], sequence: Sequence
) -> None:
    engine = engines["qwen3_next"]
    entered, go_on = threading.Event(), threading.Event()
    layers_entered = 0

    def watch(module: torch.nn.Module, _inputs: Any) -> None:
        nonlocal layers_entered
        if type(module).__name__ == "Qwen3NextDecoderLayer":
            layers_entered += 1
            entered.set()
            assert go_on.wait(30)

    hook = register_module_forward_pre_hook(watch)
    try:
        task = asyncio.create_task(score_all(engine, *sequence, 4))
        assert await asyncio.to_thread(entered.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await score_all(engine, *sequence, 4)
    finally:
        go_on.set()
        hook.remove()
    # One layer of the canceled request, then all four of the next request, which had to wait for the thread.
    assert layers_entered == 1 + 4


async def test_a_sequence_that_does_not_fit_in_memory_is_refused(
    engine: TransformersEngine, sequence: Sequence
) -> None:
    def run_out(_module: torch.nn.Module, _inputs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")

    hook = register_module_forward_pre_hook(run_out)
    try:
        with pytest.raises(LimitExceeded, match="60 tokens do not fit"):
            await score_all(engine, *sequence, 4)
    finally:
        hook.remove()
    assert await score_all(engine, *sequence, 4)


def copy_model(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_weights_that_lack_a_tensor_are_refused(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_model(model_folders["qwen3_moe"], tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 tensors, the first is lm_head\.weight"):
        TransformersEngine(folder, tokenizer_folder=folder, top_k=4, max_tokens=64)


def test_weights_cut_short_are_refused_in_one_line(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_model(model_folders["qwen3_moe"], tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot load a model") as refusal:
        TransformersEngine(folder, tokenizer_folder=folder, top_k=4, max_tokens=64)
    assert "\n" not in str(refusal.value)


def test_a_model_smaller_than_its_tokenizer_is_refused(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_model(model_folders["qwen3_moe"], tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights[name][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ entries, but the model in .* has only 100"):
        TransformersEngine(folder, tokenizer_folder=folder, top_k=4, max_tokens=64)


def test_a_model_that_scales_its_logits_is_refused(model_folders: dict[str, Path], tmp_path: Path) -> None:
    config = CohereConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.01,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data.mul_(100)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"\(cohere\) changes its head's output"):
        TransformersEngine(tmp_path / "m", tokenizer_folder=model_folders["qwen3_moe"], top_k=4, max_tokens=64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 301}, "--top-k must lie in"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"device": "cuda:99"}, "usable GPUs"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(
    settings: dict[str, Any], words: str, model_folders: dict[str, Path]
) -> None:
    folder = model_folders["qwen3_moe"]
    with pytest.raises(ConfigError, match=words):
        TransformersEngine(folder, tokenizer_folder=folder, **{"top_k": 4, "max_tokens": 64, **settings})
