"""Measure the teacher's overhead between vLLM's engine and encoded rows, against vLLM's own prompt logprobs.

    .venv-vllm/bin/python benchmarks/teacher_capture.py [--tokens 32768] [--top-k 128] [--vocab-size 8192] [--json]

One engine, one trajectory, one run (`make setup-vllm` installs what it needs).

- `..._us_per_token` is this process's time per scored token after the engine's response: for stock vLLM until its
  dictionaries or flat lists are complete, for ours until the gRPC messages are packed, checksums and digest included.
- `capture_over_prefill` is tokens/s with the rows of the supervised positions (34 %, as in real trajectories) divided by
  tokens/s of the same engine without rows. The smaller the model and the larger the vocabulary, the lower it is.
- `grpc` is the service with a client in another process, on the loopback interface, by message size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", GRPC_VERBOSITY="NONE")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import numpy as np
from numpy.typing import NDArray

from hyperagent.cache.local import LocalCache
from hyperagent.identity import TeacherIdentity
from hyperagent.topk import TopKRows
from hyperagent.wire.client import TeacherClient
from hyperagent.wire.conversion import ChunkEncoder, row_bytes

SUPERVISED_SHARE = 0.34
RUN_TOKENS = 170
"""Mean length of an assistant's turn in real trajectories."""
TOKEN = "benchmark"


def write_model(folder: Path, *, vocab_size: int, num_tokens: int) -> None:
    """Write a small random Qwen3 and a tokenizer with one word per id."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1024,
        num_hidden_layers=4,
        max_position_embeddings=num_tokens + 1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{number}": number for number in range(vocab_size - 2)}
    words |= {"<|im_start|>": vocab_size - 2, "<|im_end|>": vocab_size - 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)


class AfterEngine:
    """Accumulates the time that vLLM's output processor takes in this process."""

    def __init__(self, engine: Any) -> None:
        self.seconds = 0.0
        processor = engine._engine.output_processor
        stock = processor.process_outputs

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return stock(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - started

        processor.process_outputs = timed


async def stock(engine: Any, ids: NDArray[np.uint32], **options: Any) -> float:
    """Return the seconds of an ordinary vLLM request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **options
    )
    started = time.perf_counter()
    prompt = {"prompt_token_ids": ids.tolist()}
    async for _ in engine._engine.generate(prompt, parameters, request_id=str(time.monotonic_ns())):
        pass
    return time.perf_counter() - started


async def ours(engine: Any, ids: NDArray[np.uint32], positions: NDArray[np.uint32], top_k: int) -> tuple[float, float]:
    """Return the seconds of a tapped request whose rows are packed into messages, and those after vLLM's response."""
    answered = 0.0
    answer = engine._answer

    async def stamped(*arguments: Any) -> Any:
        nonlocal answered
        output = await answer(*arguments)
        answered = time.perf_counter()
        return output

    engine._answer = stamped
    started = time.perf_counter()
    num_temperatures = len(engine.identity.temperatures)
    encoder, sent = ChunkEncoder(top_k=top_k, num_temperatures=num_temperatures), 0
    async with aclosing(engine.score(ids, positions, top_k=top_k)) as parts:
        async for part in parts:
            sent += sum(len(chunk.SerializeToString()) for chunk in encoder.add(part))
    sent += len(encoder.finish().SerializeToString())
    ended = time.perf_counter()
    engine._answer = answer
    assert sent >= len(positions) * row_bytes(top_k, num_temperatures)
    return ended - started, ended - answered


def supervised(num_tokens: int) -> NDArray[np.uint32]:
    """Return positions in runs, with the same fraction of supervised tokens as real trajectories."""
    turn = round(RUN_TOKENS / SUPERVISED_SHARE)
    places = np.arange(1, num_tokens, dtype=np.uint32)
    return places[places % turn >= turn - RUN_TOKENS]


async def measure_engine(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from hyperagent_teacher.engines.vllm import VllmEngine

    engine = await VllmEngine.load(
        folder,
        tokenizer_folder=folder,
        top_k=options.top_k,
        max_tokens=options.tokens + 1,
        engine_args={
            "enforce_eager": True,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "max_num_batched_tokens": 2048,
        },
    )
    ids = np.random.default_rng(0).integers(0, options.vocab_size, options.tokens).astype(np.uint32)
    everywhere, some = np.arange(1, options.tokens, dtype=np.uint32), supervised(options.tokens)
    after = AfterEngine(engine)
    for options_of_request in ({}, {"prompt_logprobs": options.top_k}):  # warm up: the first run compiles
        await stock(engine, ids[:64], **options_of_request)
    await stock(engine, ids)
    prefill = min([await stock(engine, ids) for _ in range(2)])
    capture = min([(await ours(engine, ids, some, options.top_k))[0] for _ in range(2)])

    async def after_of(call: Any) -> tuple[float, Any]:
        after.seconds = 0.0
        result = await call
        return after.seconds, result

    processing, (capture_all, packing) = await after_of(ours(engine, ids, everywhere, options.top_k))
    flat, flat_whole = await after_of(stock(engine, ids, prompt_logprobs=options.top_k, flat_logprobs=True))
    dicts, dict_whole = await after_of(stock(engine, ids, prompt_logprobs=options.top_k))
    engine.close()
    per_token = 1e6 / len(everywhere)
    return {
        "prefill_tokens_per_s": options.tokens / prefill,
        "capture_tokens_per_s": options.tokens / capture,
        "capture_over_prefill": prefill / capture,
        "supervised_share": len(some) / options.tokens,
        "capture_all_tokens_per_s": options.tokens / capture_all,
        "stock_flat_tokens_per_s": options.tokens / flat_whole,
        "stock_dict_tokens_per_s": options.tokens / dict_whole,
        "ours_us_per_token": (processing + packing) * per_token,
        "stock_flat_us_per_token": flat * per_token,
        "stock_dict_us_per_token": dicts * per_token,
        "ours_over_flat": (processing + packing) / flat,
    }


class ReplayEngine:
    """Engine that returns uniform rows immediately, so that only the path to the client is measured."""

    rows_per_step = 1
    progress = 0

    def __init__(self, identity: TeacherIdentity, max_tokens: int) -> None:
        self.identity, self.max_tokens = identity, max_tokens

    async def score(
        self, _ids: NDArray[np.uint32], positions: NDArray[np.uint32], *, top_k: int
    ) -> AsyncGenerator[TopKRows, None]:
        uniform = np.float32(-np.log(self.identity.vocab_size))
        tail = np.float32(np.log1p(-top_k / self.identity.vocab_size))
        n = min(4096, len(positions))
        ids, logprobs = np.tile(np.arange(top_k, dtype=np.uint32), (n, 1)), np.full((n, top_k), uniform)
        for start in range(0, len(positions), n):
            part = positions[start : start + n]
            cut = slice(0, len(part))
            self.progress += 1
            rest = np.full(len(part), tail), np.full(len(part), uniform), np.empty((len(part), 0), np.float32)
            yield TopKRows(part, ids[cut], logprobs[cut], *rest)

    async def restart(self) -> None:
        """Do nothing: this engine never hangs."""

    def close(self) -> None:
        """Do nothing: this engine holds no resources."""


def serve_replay(identity: TeacherIdentity, folder: str, chunk_kib: int, max_tokens: int, address: Any) -> None:
    """Run the real service with a `ReplayEngine`, in a separate process."""
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    from hyperagent_teacher.config import TeacherSettings
    from hyperagent_teacher.service.server import answer, bind

    async def run() -> None:
        settings = TeacherSettings(model=Path(folder), cache=Path(folder) / "cache", port=0, chunk_kib=chunk_kib)
        cache = LocalCache.create_or_open(settings.cache, identity)
        server, place = await bind(settings, token=TOKEN)
        address.put(place)
        await answer(server, ReplayEngine(identity, max_tokens), cache, settings, stop=asyncio.Event())

    asyncio.run(run())


def measure_grpc(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return bytes of rows per second, by KiB per message."""
    identity = TeacherIdentity(
        "t", "0" * 64, "float32", "replay", "0" * 64, "0" * 64, options.vocab_size, options.top_k
    )
    context = multiprocessing.get_context("spawn")
    positions = np.arange(1, options.tokens, dtype=np.uint32)
    ids = np.zeros(options.tokens, np.uint32)

    async def ask(place: str) -> float:
        async with TeacherClient(place, TOKEN) as client:
            await client.wait_until_serving(60)
            best = float("inf")
            for _ in range(3):
                started = time.perf_counter()
                answer = client.score_tokens(ids, positions, top_k=options.top_k, tokenizer=identity.tokenizer)
                received = sum([part.num_rows async for part in answer])
                assert received == len(positions)
                best = min(best, time.perf_counter() - started)
        return len(positions) * row_bytes(options.top_k, 0) / best

    speeds = {}
    for chunk_kib in options.chunk_kib:
        address = context.Queue()
        arguments = (identity, str(folder), chunk_kib, options.tokens, address)
        server = context.Process(target=serve_replay, args=arguments)
        server.start()
        speeds[str(chunk_kib)] = asyncio.run(ask(address.get(timeout=60)))
        server.kill()
        server.join()
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument(
        "--chunk-kib", type=int, nargs="+", default=[64, 256, 512, 1024, 2048], help="sizes of a message"
    )
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    if options.smoke:
        options.tokens, options.top_k, options.vocab_size, options.chunk_kib = 1024, 8, 512, [64]
    try:
        import vllm
    except ModuleNotFoundError:
        parser.error("vLLM is not in this environment; run `make setup-vllm`, then .venv-vllm/bin/python of it")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), vocab_size=options.vocab_size, num_tokens=options.tokens)
        result: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "vllm": vllm.__version__,
            "tokens": options.tokens,
            "top_k": options.top_k,
            "vocab_size": options.vocab_size,
        }
        result |= asyncio.run(measure_engine(Path(folder), options))
        result["grpc_bytes_per_s"] = measure_grpc(options, Path(folder))
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        shown = {key: f"{number / 1e9:.2f} GB/s" for key, number in value.items()} if isinstance(value, dict) else value
        print(f"{name:<26} {shown:,.2f}" if isinstance(shown, float) else f"{name:<26} {shown}")


if __name__ == "__main__":
    main()
