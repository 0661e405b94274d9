"""Latency and limits of the adapter service, as a real process over HTTP, from raw sockets that add next to nothing.

    python benchmarks/adapter_api.py [--seconds 120] [--json] [--smoke]

    hit_p50_ms, hit_p99_ms       an adapter that exists, one keep-alive connection, one request after another
    identical_*                  1,000 requests at once for the same new prompt: adapters generated, requests refused
    steady_*                     200 hits and 50 new prompts each second: requests that were not answered with 200 or 201
    overload_*                   new prompts at five times the rate that the service can generate: answers by status, adapters made
                                 a second as a share of `capacity_per_s`, which one prompt after another gave
    refuse_1m_*                  a prompt of a million tokens: milliseconds until it is refused, memory that it cost, and a hit meanwhile
    overhead_48_layers           time of a new adapter for 48 layers of the real student beyond the network's own forward pass in
                                 this process, as a share of it

Timings mean something on an otherwise idle machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from generate import HIDDEN, real_student
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.identity import DataIdentity
from hyperagent.model.bundle import BundleManifest, load_bundle, save_bundle
from hyperagent.model.config import HyperNetworkConfig, LayerInfo
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.targets import discover_target_layers
from hyperagent_demo.processes import free_port
from hyperagent_demo.tokenizer import train_tokenizer

TOKEN = "benchmark"
NUM_IDENTICAL = 1000
Answer = tuple[int, bytes]


def tiny_layers() -> tuple[tuple[LayerInfo, ...], int]:
    config = Qwen3NextConfig(  # type: ignore[call-arg]
        vocab_size=512, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
        full_attention_interval=4, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return tuple(discover_target_layers(Qwen3NextForCausalLM(config))), 64


def write_bundle(folder: Path, layers: tuple[LayerInfo, ...], hidden_size: int) -> Path:
    """Write a bundle of a random network for a student's layers."""
    tokenizer_folder = folder.with_name(f"{folder.name}-tokenizer")
    train_tokenizer(
        ["user assistant Mend the failing test number 0123456789 in the parser."] * 4, tokenizer_folder, vocab_size=512
    )
    tokenizer = ChatTokenizer(tokenizer_folder)
    config = HyperNetworkConfig.preset("tiny")
    torch.manual_seed(0)
    network = AgenticHyperNetwork(config, layers, hidden_size)
    for head in network.b_parameters():
        torch.nn.init.normal_(head, std=0.01)
    manifest = BundleManifest(
        base_model="student",
        student_weights="0" * 64,
        teacher="0" * 64,
        data=DataIdentity(tokenizer.identity, "0" * 64, {"views": {"condition": ["task"], "internalised": []}}),
        condition=("task",),
        hypernetwork=config,
        layers=layers,
        max_prompt_tokens=4096,
        step=1,
    )
    table = torch.randn(tokenizer.vocab_size, hidden_size)
    save_bundle(folder, manifest, hypernetwork=network, embeddings=table, tokenizer_folder=tokenizer_folder, card="")
    return folder


class Connection:
    """One keep-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, prompt: str) -> Answer:
        body = json.dumps({"prompt": prompt}).encode()
        head = f"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        header = await self._reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in header.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return int(header.split()[1]), await self._reader.readexactly(length)

    def close(self) -> None:
        self._writer.close()


async def ask(port: int, prompt: str) -> int:
    connection = await Connection.open(port)
    try:
        return (await connection.post(prompt))[0]
    finally:
        connection.close()


@asynccontextmanager
async def service(bundle: Path, *arguments: str) -> AsyncIterator[tuple[int, psutil.Process]]:
    """Run the service while the block runs; yield its port and process."""
    port = free_port()
    command = [sys.executable, "-m", "hyperagent", "serve", "adapter-api", "--bundle", str(bundle), "--port", str(port)]
    command += ["--store", str(bundle.with_name(f"{bundle.name}-store")), *arguments]
    process = subprocess.Popen(
        command,
        env={**os.environ, "HYPERAGENT_TOKEN": TOKEN},
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                await ask(port, "warm up")
                break
            except (ConnectionError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.1)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


async def timed(connection: Connection, prompt: str) -> float:
    started = time.perf_counter()
    status, _ = await connection.post(prompt)
    assert status in (200, 201), status
    return 1000 * (time.perf_counter() - started)


async def hits(port: int, num: int) -> dict[str, float]:
    connection = await Connection.open(port)
    await connection.post("known")
    found = sorted([await timed(connection, "known") for _ in range(num)])
    connection.close()
    return {"hit_p50_ms": found[num // 2], "hit_p99_ms": found[int(num * 0.99)]}


async def identical(port: int, num: int) -> dict[str, int]:
    statuses = Counter(await asyncio.gather(*(ask(port, "the same for all") for _ in range(num))))
    return {"identical_generations": statuses[201], "identical_refused": num - statuses[200] - statuses[201]}


async def at_rate(port: int, prompts: list[str], per_s: float) -> Counter[int]:
    """Send prompts in open loop at a rate, whatever the answers."""
    started, tasks = time.perf_counter(), []
    for number, prompt in enumerate(prompts):
        await asyncio.sleep(max(0.0, started + number / per_s - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(port, prompt)))
    return Counter(await asyncio.gather(*tasks))


async def steady(port: int, seconds: float) -> dict[str, int]:
    known = at_rate(port, ["known"] * round(200 * seconds), 200)
    new = at_rate(port, [f"new prompt {n}" for n in range(round(50 * seconds))], 50)
    statuses = sum(await asyncio.gather(known, new), Counter[int]())
    return {"steady_requests": statuses.total(), "steady_errors": statuses.total() - statuses[200] - statuses[201]}


async def overload(port: int, seconds: float) -> dict[str, Any]:
    connection = await Connection.open(port)
    capacity = 1000 / statistics.median([await timed(connection, f"capacity {n}") for n in range(40)])
    connection.close()
    rate = 5 * capacity
    started = time.perf_counter()
    statuses = await at_rate(port, [f"overload {n}" for n in range(round(rate * seconds))], rate)
    goodput = statuses[201] / (time.perf_counter() - started)
    return {
        "capacity_per_s": capacity,
        "overload_goodput_share": goodput / capacity,
        "overload_statuses": {str(status): count for status, count in sorted(statuses.items())},
    }


async def refuse(port: int, process: psutil.Process) -> dict[str, float]:
    connection, other = await Connection.open(port), await Connection.open(port)
    before = process.memory_info().rss
    started = time.perf_counter()
    asked = asyncio.create_task(connection.post("a b " * 1_000_000))
    meanwhile = await timed(other, "known")
    status, _ = await asked
    elapsed = 1000 * (time.perf_counter() - started)
    assert status == 413, status
    cost = (process.memory_info().rss - before) / 2**20
    return {"refuse_1m_ms": elapsed, "refuse_1m_mib": cost, "refuse_1m_hit_ms": meanwhile}


async def overhead(place: Path, layers: tuple[LayerInfo, ...], hidden_size: int, num: int) -> dict[str, float]:
    folder = write_bundle(place / "large", layers, hidden_size)
    bundle = load_bundle(folder)
    tokenizer = ChatTokenizer(bundle.tokenizer_folder)
    ids = [tokenizer.encode(f"prompt {n}").ids for n in range(num)]
    forward = []
    for prompt in ids:
        started = time.perf_counter()
        bundle.generate(prompt)
        forward.append(1000 * (time.perf_counter() - started))
    async with service(folder) as (port, _):
        connection = await Connection.open(port)
        whole = [await timed(connection, f"prompt {n}") for n in range(num)]
        connection.close()
    alone = statistics.median(forward)
    return {"forward_48_layers_ms": alone, "overhead_48_layers": statistics.median(whole) / alone - 1}


async def measure(place: Path, *, seconds: float, is_smoke: bool) -> dict[str, Any]:
    folder = write_bundle(place / "tiny", *tiny_layers())
    found: dict[str, Any] = {}
    async with service(folder, "--max-pending-requests", "64") as (port, process):
        found |= await hits(port, 50 if is_smoke else 2000)
        found |= await identical(port, 50 if is_smoke else NUM_IDENTICAL)
        found |= await refuse(port, process)
        found |= await steady(port, seconds)
        found |= await overload(port, seconds / 6)
    real = tiny_layers() if is_smoke else (tuple(discover_target_layers(real_student())), HIDDEN)
    return found | await overhead(place, *real, num=3 if is_smoke else 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="length of the steady load")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see whether it runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hyperagent-adapter-api-") as place:
        seconds = 2.0 if options.smoke else options.seconds
        found = asyncio.run(measure(Path(place), seconds=seconds, is_smoke=options.smoke))
    machine = {"processor": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    if options.json:
        print(json.dumps({"machine": machine, "torch": torch.__version__, **found}, indent=2))
        return
    for name, value in found.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    main()
