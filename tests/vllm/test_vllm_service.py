"""Test `hyperagent serve teacher --backend vllm` as a process whose engine is frozen and killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from vllm_world import ENGINE_ARGS, TOP_K, sequence

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.errors import NotServing, ServiceError
from hyperagent.topk import TopKRows, concatenate
from hyperagent.wire.client import TeacherClient

TOKEN = "a-token"
START_S = 150.0


@contextmanager
def teacher(model: Path, cache: Path, port: int, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "hyperagent", "serve", "teacher", "--backend", "vllm", "--model", str(model)]
    command += ["--cache", str(cache), "--port", str(port), "--top-k", str(TOP_K), "--max-tokens", "2048"]
    command += ["--engine-args", json.dumps(ENGINE_ARGS), *(part for pair in settings.items() for part in pair)]
    with subprocess.Popen(command, env={**os.environ, "HYPERAGENT_TOKEN": TOKEN}, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for one in psutil.Process(process.pid).children(recursive=True):
                    one.kill()
                process.kill()


def engine_processes(teacher_pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(teacher_pid).children(recursive=True) if "VLLM" in child.name()]


async def rows_of(client: TeacherClient, tokenizer: ChatTokenizer, seed: int = 0) -> TopKRows:
    token_ids, positions = sequence(tokenizer.vocab_size, seed)
    parts = client.score_tokens(token_ids, positions, top_k=TOP_K, tokenizer=tokenizer.identity, timeout_s=120)
    return concatenate([part async for part in parts])


async def until_refused(client: TeacherClient) -> float:
    """Return the seconds until the teacher reports that it is not serving."""
    started = time.monotonic()
    async with asyncio.timeout(60):
        while True:
            try:
                await client.wait_until_serving(1.0)
            except ServiceError as error:
                if "NOT_SERVING" in str(error):
                    return time.monotonic() - started
                raise
            await asyncio.sleep(0.1)


@pytest.mark.timeout(500)
async def test_a_frozen_engine_is_noticed_and_a_killed_one_is_started_again(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = model_folders["qwen3"]
    tokenizer = ChatTokenizer(folder)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    with teacher(folder, tmp_path / "cache", port, **{"--engine-restart-s": "8"}) as process:
        async with TeacherClient(f"127.0.0.1:{port}", TOKEN) as client:
            await client.wait_until_serving(START_S)
            before = await rows_of(client, tokenizer)

            frozen = engine_processes(process.pid)
            assert frozen
            for one in frozen:
                one.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(rows_of(client, tokenizer))
            assert await until_refused(client) <= 15
            with pytest.raises(NotServing):
                await rows_of(client, tokenizer, seed=1)
            for one in frozen:
                one.send_signal(signal.SIGCONT)
            await client.wait_until_serving(30)
            # The waiting stream continues.
            np.testing.assert_allclose((await waiting).logprobs, before.logprobs, atol=2e-5)

            frozen[0].kill()
            assert await until_refused(client) <= 15
            await client.wait_until_serving(START_S)
            np.testing.assert_allclose((await rows_of(client, tokenizer)).logprobs, before.logprobs, atol=2e-5)

            for one in engine_processes(process.pid):
                one.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(rows_of(client, tokenizer))
            # An engine that stays frozen is killed and restarted, and waiting callers get an error.
            with pytest.raises(NotServing, match="being restarted"):
                await asyncio.wait_for(waiting, 60)
            await client.wait_until_serving(START_S)
            np.testing.assert_allclose((await rows_of(client, tokenizer)).logprobs, before.logprobs, atol=2e-5)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0
