"""Tests of the plugin in a real vLLM server on the CPU, beside a real adapter service, through the public clients."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import configurations, write_model, write_tokenizer
from transformers import AutoModelForCausalLM

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.http.adapter_client import AdapterClient
from hyperagent.http.adapter_models import PromptBody
from hyperagent.identity import DataIdentity
from hyperagent.model.adapter import LoRAPair
from hyperagent.model.bundle import BundleManifest, save_bundle
from hyperagent.model.config import HyperNetworkConfig
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.lora import HookBasedLoRAInjector
from hyperagent.model.peft_io import read_adapter
from hyperagent.model.targets import discover_target_layers

ROOT = Path(__file__).parents[2]
TOKEN = "secret"
TOKENS = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(3)).tolist()
ONE, TWO = "Mend the parser.", "Write more tests for the scheduler and its queue."


@dataclass(frozen=True)
class World:
    student: Path
    store: Path
    service: AdapterClient
    service_url: str
    engine: str
    """URL of the engine."""
    log: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.engine}/v1", api_key="none", max_retries=0)

    def adapter_id(self, prompt: str) -> str:
        return self.service.create(PromptBody(prompt=prompt)).id


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_bundle(student: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    layers = tuple(discover_target_layers(model))
    config = HyperNetworkConfig(width=32, num_latents=4, encoder_blocks=1, generator_blocks=1, rank=4, alpha=8.0)
    torch.manual_seed(1)
    network = AgenticHyperNetwork(config, layers, model.config.hidden_size)
    for head in network.generator.b_heads.values():
        torch.nn.init.normal_(head.weight, std=0.5)
    manifest = BundleManifest(
        base_model="student",
        student_weights="0" * 64,
        teacher="0" * 64,
        data=DataIdentity(
            ChatTokenizer(student).identity, "0" * 64, {"views": {"condition": ["task"], "internalised": []}}
        ),
        condition=("task",),
        hypernetwork=config,
        layers=layers,
        max_prompt_tokens=200,
        step=1,
    )
    table = model.get_input_embeddings().weight
    save_bundle(folder, manifest, hypernetwork=network, embeddings=table, tokenizer_folder=student, card="")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("serving")
    student, store = root / "student", root / "store"
    write_model(student, configurations()["qwen3"], dtype=torch.bfloat16)
    write_tokenizer(student)
    write_bundle(student, root / "bundle")
    ports = free_port(), free_port()
    service_url, engine_url = (f"http://127.0.0.1:{port}" for port in ports)
    environment = {**os.environ, "HYPERAGENT_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    serve = [
        ROOT / ".venv" / "bin" / "hyperagent",
        "serve",
        "adapter-api",
        "--bundle",
        root / "bundle",
        "--store",
        store,
    ]
    engine = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        student,
        "--served-model-name",
        "student",
    ]
    engine += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--max-cpu-loras", "2", "--enforce-eager"]
    engine += [
        "--dtype",
        "bfloat16",
        "--max-model-len",
        "512",
        "--gpu-memory-utilization",
        "0.3",
        "--host",
        "127.0.0.1",
    ]
    with (root / "engine.txt").open("wb") as log, (root / "service.txt").open("wb") as service_log:
        processes = [
            subprocess.Popen([*map(str, serve), "--port", str(ports[0])], env=environment, stderr=service_log),
            subprocess.Popen(
                [*map(str, engine), "--port", str(ports[1])],
                env={
                    **environment,
                    "HYPERAGENT_VLLM_SERVICE": service_url,
                    "HYPERAGENT_VLLM_STAGING": str(root / "staging"),
                    "HYPERAGENT_VLLM_TIMEOUT_S": "60",
                },
                stdout=log,
                stderr=log,
            ),
        ]
        try:
            with AdapterClient(service_url, TOKEN) as service:
                service.wait_until_ready(120)
                wait_for(engine_url, processes[1], root / "engine.txt")
                yield World(student, store, service, service_url, engine_url, root / "engine.txt")
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 280
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)


def ask(world: World, model: str, prompt: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": prompt}]
    return world.client().chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=8,
        temperature=0,
        logprobs=True,
        extra_body={"ignore_eos": True},
        **options,
    )


def forced(world: World, model: str, tokens: list[int]) -> NDArray[np.float64]:
    """Return the log-probabilities of a prompt's tokens but the first; no choice of a token depends on rounding."""
    body = {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = httpx.post(f"{world.engine}/v1/completions", json=body, timeout=120).raise_for_status().json()
    rows = answer["choices"][0]["prompt_logprobs"][1:]
    return np.array([row[str(token)]["logprob"] for row, token in zip(rows, tokens[1:], strict=True)])


def first_token(world: World, model: str) -> dict[str, float]:
    """Return the log-probabilities of the twenty likeliest first tokens of an answer, by token."""
    messages: Any = [{"role": "user", "content": ONE}]
    answer = world.client().chat.completions.create(
        model=model, messages=messages, max_tokens=1, temperature=0, logprobs=True, top_logprobs=20
    )
    (token,) = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    return {f"{found.token} {found.bytes}": found.logprob for found in token.top_logprobs}


def difference(one: dict[str, float], other: dict[str, float]) -> float:
    """Return the largest difference of a log-probability; a token that one of them lacks is as unlikely as its least."""
    least = min(*one.values(), *other.values())
    return max(abs(one.get(token, least) - other.get(token, least)) for token in one | other)


def logprobs(answer: Any) -> list[float]:
    return [token.logprob for token in answer.choices[0].logprobs.content]


pytestmark = pytest.mark.timeout(400)


def test_hyper_auto_answers_with_the_adapter_of_the_prompt_from_a_cold_start(world: World) -> None:
    found = {prompt: ask(world, "hyper:auto", prompt) for prompt in (ONE, TWO)}
    assert [answer.model for answer in found.values()] == [f"hyper:{world.adapter_id(prompt)}" for prompt in (ONE, TWO)]
    bare = ask(world, "student", ONE)
    assert bare.model == "student"
    # Two prompts, two behaviors, neither of them the student's own.
    own, foreign = ask(world, f"hyper:{world.adapter_id(ONE)}", ONE), ask(world, f"hyper:{world.adapter_id(TWO)}", ONE)
    assert logprobs(own) == logprobs(found[ONE])
    assert len({tuple(logprobs(answer)) for answer in (own, foreign, bare)}) == 3


def test_all_turns_of_a_conversation_keep_their_adapter_streamed_or_not(world: World) -> None:
    messages: Any = [
        {"role": "user", "content": ONE},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": TWO},
    ]
    name = f"hyper:{world.adapter_id(ONE)}"
    options: dict[str, Any] = {"model": "hyper:auto", "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = world.client().chat.completions.create(**options)
    chunks = list(world.client().chat.completions.create(**options, stream=True))
    assert {whole.model, *(chunk.model for chunk in chunks)} == {name}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_the_other_interfaces_understand_it_too(world: World) -> None:
    name = f"hyper:{world.adapter_id(ONE)}"
    client = world.client()
    assert client.completions.create(model="hyper:auto", prompt=ONE, max_tokens=4, temperature=0).model == name
    assert client.responses.create(model="hyper:auto", input=ONE, max_output_tokens=4, temperature=0).model == name
    claude = anthropic.Anthropic(base_url=world.engine, api_key="none", max_retries=0)
    question: Any = [{"role": "user", "content": ONE}]
    answer = claude.messages.create(model="hyper:auto", max_tokens=4, messages=question)
    assert answer.model == name
    with claude.messages.stream(model="hyper:auto", max_tokens=4, messages=question) as stream:
        assert isinstance("".join(stream.text_stream), str)


def test_the_engine_computes_what_the_injected_student_computes(world: World, tmp_path: Path) -> None:
    adapter = world.service.create(PromptBody(prompt=ONE))
    world.service.download(adapter, tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter")
    student = AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.bfloat16).eval()
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        bare = student(input_ids=ids).logits[0].float().log_softmax(-1)
        batched = {name: LoRAPair(pair.a[None], pair.b[None]) for name, pair in read.weights.items()}
        with HookBasedLoRAInjector(student, scale=read.alpha / read.rank).inject(batched):
            adapted = student(input_ids=ids).logits[0].float().log_softmax(-1)
    place = torch.arange(59)
    wanted, base = (found[place, ids[0, 1:]].numpy() for found in (adapted, bare))
    found = forced(world, f"hyper:{adapter.id}", TOKENS)
    assert np.abs(wanted - base).max() > 1
    distance = np.abs(found - wanted)
    assert np.quantile(distance, 0.5) <= 0.03
    assert np.quantile(distance, 0.99) <= 0.3


def test_check_serving_accepts_the_adapter_and_finds_a_silent_no_op(world: World, tmp_path: Path) -> None:
    adapter, other = (world.service.create(PromptBody(prompt=prompt)) for prompt in (ONE, TWO))
    world.service.download(adapter, tmp_path / "adapter")
    command = [
        sys.executable,
        "-m",
        "hyperagent",
        "check-serving",
        "--engine",
        world.engine,
        "--student",
        str(world.student),
    ]
    command += ["--adapter", str(tmp_path / "adapter"), "--base", "student"]

    def check(model: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "--model", model, *more], capture_output=True, text=True, check=False)

    assert check(f"hyper:{adapter.id}", "--other", f"hyper:{other.id}").returncode == 0
    for model, why in (
        ("student", "the engine does not apply the adapter: student answers like student"),
        (f"hyper:{other.id}", "the engine applies another adapter than this one"),
        ("hyper:" + "0" * 64, "the engine refuses hyper:000"),
    ):
        done = check(model)
        assert (done.returncode, why in done.stderr) == (1, True), done.stderr
        assert "Traceback" not in done.stderr


def test_a_mixed_batch_equals_every_request_alone(world: World) -> None:
    names = ["student", *(f"hyper:{world.adapter_id(prompt)}" for prompt in (ONE, TWO))]
    alone = {name: first_token(world, name) for name in names}
    for one, other in itertools.combinations(names, 2):
        assert difference(alone[one], alone[other]) > 0.3
    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(lambda name: first_token(world, name), names * 3))
    for name, found in zip(names * 3, together, strict=True):
        # Batches of other sizes are summed in another order.
        assert difference(found, alone[name]) < 0.15


def test_an_adapter_stays_what_it_was_whatever_happens_to_the_store(world: World) -> None:
    """Four adapters with two places in the engine: each is read again from its copy when it comes back."""
    ids = [world.adapter_id(f"Mend part number {number} of the parser.") for number in range(4)]
    before = {name: forced(world, f"hyper:{name}", TOKENS) for name in ids}
    for name in ids[:2]:
        (path,) = world.store.glob(f"*/{name}/{MODEL_FILE}")
        path.write_bytes(b"tampered with")
    for name in ids[2:]:
        httpx.delete(
            f"{world.service_url}/v1/adapters/{name}", headers={"Authorization": f"Bearer {TOKEN}"}
        ).raise_for_status()
    for name in ids * 2:
        found = forced(world, f"hyper:{name}", TOKENS)
        distance = {other: float(np.abs(found - before[other]).mean()) for other in ids}
        assert min(distance, key=lambda other: distance[other]) == name
        assert distance[name] < 0.05


def test_what_cannot_be_answered_is_refused_and_the_engine_lives_on(world: World) -> None:
    for model, kind in (("hyper:" + "0" * 64, openai.NotFoundError), ("hyper:nonsense", openai.BadRequestError),
                        ("hyper:../../etc", openai.BadRequestError), ("unknown", openai.NotFoundError)):  # fmt: skip
        with pytest.raises(kind):
            ask(world, model, ONE)
    with pytest.raises(openai.BadRequestError, match="needs a user message with text"):
        ask(world, "hyper:auto", " ")
    with pytest.raises(openai.BadRequestError, match="at most 200"):
        ask(world, "hyper:auto", "word " * 300)
    # An adapter of another student, whose record in the store is right.
    adapter = world.service.create(PromptBody(prompt="Mend something else."))
    assert set(world.service.files(adapter)) == {MODEL_FILE, CONFIG_FILE}
    assert ask(world, "student", ONE).model == "student"


async def test_many_requests_for_one_new_prompt_load_it_once(world: World) -> None:
    client = openai.AsyncOpenAI(base_url=f"{world.engine}/v1", api_key="none", max_retries=0)
    question: Any = [{"role": "user", "content": "A prompt that nobody has sent yet."}]
    asked = [
        client.chat.completions.create(model="hyper:auto", messages=question, max_tokens=2, temperature=0)
        for _ in range(12)
    ]
    models = {answer.model for answer in await asyncio.gather(*asked)}
    assert len(models) == 1
    assert world.log.read_text().count(f"adapter loaded                 id={models.pop().removeprefix('hyper:')}") <= 1
