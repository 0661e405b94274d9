"""The loop: trajectories in, a prompt-conditioned LoRA out, every arrow a real process, port and file.

The demo starts the services as a user would and talks to them over the network only. What it writes to OUT:

    demo.json         the configuration              cache/     the teacher's cache
    sample.parquet    trajectories, if none given    recipes/   the trainer's recipe
    tokenizer/        likewise                       runs/      the trainer's runs
    tokens.parquet    trajectories as token ids      bundle/    what the adapter service serves
    report.json .png  the result                     adapters/  what it has generated
    logs/             one per process                adapter/   one of them, downloaded
    teacher, student  links to the pre-trained models
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hyperagent.cache.local import LocalCache
from hyperagent.cache.maintenance.stats import CacheStats, count
from hyperagent.cache.maintenance.verify import verify
from hyperagent.data.chat.messages import dialogue_of
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.reader import read_rows
from hyperagent.data.files.tokens_file import count_tokens_rows, read_data_identity, read_tokens
from hyperagent.data.pipeline.selection import Selection
from hyperagent.data.pipeline.split import SplitSettings
from hyperagent.data.pipeline.tokenize_dataset import TokenizeReport, TokenizeSettings, tokenize_file
from hyperagent.errors import ConfigError, DataError, ServiceError
from hyperagent.http.adapter_client import AdapterClient
from hyperagent.http.adapter_models import PromptBody
from hyperagent.http.run_client import RunClient
from hyperagent.http.run_models import RunBody, RunRequest
from hyperagent.storage.files import new_directory, write_atomically
from hyperagent.wire.client import TeacherClient
from hyperagent.wire.outcome import Outcome
from hyperagent_demo.config import DemoConfig
from hyperagent_demo.peft_check import PeftCheckJob
from hyperagent_demo.pretrain import PretrainedModels, pretrain_models
from hyperagent_demo.processes import ServiceProcess, free_port, run_worker, service
from hyperagent_demo.sample.generate import write_sample
from hyperagent_demo.stages import Bar, Stages
from hyperagent_demo.tokenizer import tokenizer_texts, train_tokenizer


@dataclass(frozen=True)
class LoopResult:
    """What the loop measured."""

    source: Path
    tokenized: TokenizeReport
    models: PretrainedModels
    cache: CacheStats
    run: RunBody
    """The run in its final state."""
    metrics: list[dict[str, Any]]
    """Every line of the run's metrics."""
    prompt: str
    """The task the adapter was made for."""
    peft: dict[str, float]


def run_loop(
    config: DemoConfig, *, data: Path | None, tokenizer: Path | None, out: Path, model_store: Path, stages: Stages
) -> LoopResult:
    """Run every stage.

    Args:
        data: trajectories in Parquet; without, the sample is generated.
        tokenizer: folder of a tokenizer with a chat template; without, one is trained on the data.
        model_store: keeps pre-trained models from one run to the next.

    Raises:
        HyperagentError: an input is wrong or a process failed; says which log to read.
    """
    _start_afresh(out, config)
    source, tokenizer = _trajectories(config, data, tokenizer, out, stages)
    tokens = out / "tokens.parquet"
    with stages.stage("tokenize") as bar:
        tokenized = tokenize_file(
            source,
            tokens,
            ChatTokenizer(tokenizer),
            TokenizeSettings(
                views=config.views,
                selection=Selection(sample=config.max_rows, seed=config.seed),
                split=SplitSettings(held_out_share=config.held_out_share, seed=config.seed),
            ),
            reading=bar.update,
            tokenizing=bar.update,
        )
    models = pretrain_models(config, tokens=tokens, tokenizer=tokenizer, store=model_store, out=out, stages=stages)
    for name, folder in (("teacher", models.teacher), ("student", models.student)):
        # Relative, so that the two folders can be moved together.
        (out / name).symlink_to(os.path.relpath(folder, out))
    token = secrets.token_urlsafe(32)
    with stages.stage("populate", total=count_tokens_rows(tokens)) as bar:
        cache = _populate(config, models.teacher, tokens, out, token, bar)
    with stages.stage("distil", total=config.distill.num_steps) as bar:
        run, metrics = _distil(config, models.student, tokens, out, token, bar)
    with stages.stage("adapter"):
        prompt = _adapter(source, out, token)
    with stages.stage("peft check"):
        job = PeftCheckJob(
            student=models.student, adapter=out / "adapter", probe=_run_folder(out, run) / "probe.safetensors"
        )
        job_file = out / "logs" / "peft_check.json"
        write_atomically(job_file, job.model_dump_json().encode())
        peft = run_worker("hyperagent_demo.peft_check", job_file, log=out / "logs" / "peft_check.txt", threads=2)
    return LoopResult(source, tokenized, models, cache, run, metrics, prompt, peft)


def _start_afresh(out: Path, config: DemoConfig) -> None:
    """Empty a former demo's folder; refuse to touch any other."""
    marker = out / "demo.json"
    if out.exists():
        if any(out.iterdir()) and not marker.is_file():
            raise ConfigError(f"{out} holds other files than a demo's; choose another --out")
        shutil.rmtree(out)
    write_atomically(marker, config.model_dump_json(indent=2).encode() + b"\n")


def _trajectories(
    config: DemoConfig, data: Path | None, tokenizer: Path | None, out: Path, stages: Stages
) -> tuple[Path, Path]:
    """The trajectories and the tokenizer: the user's, or the demo's own."""
    source = data or out / "sample.parquet"
    if data is None:
        with stages.stage("sample") as bar:
            write_sample(source, seed=config.seed, rows=config.sample_rows, progress=bar.update)
    if tokenizer is None:
        tokenizer = out / "tokenizer"
        with stages.stage("tokenizer"):
            train_tokenizer(tokenizer_texts(source), tokenizer, vocab_size=config.vocab_size)
    return source, tokenizer


def _populate(config: DemoConfig, teacher: Path, tokens: Path, out: Path, token: str, bar: Bar) -> CacheStats:
    """Serve the teacher, have it fill the cache over gRPC, check every record."""
    port = free_port()
    cache = out / "cache"
    arguments = ["--model", str(teacher), "--cache", str(cache), "--port", str(port)]
    arguments += ["--top-k", str(config.top_k), "--max-tokens", str(config.views.max_tokens)]
    address = f"127.0.0.1:{port}"
    with service("teacher", arguments, log=out / "logs" / "teacher.txt", token=token) as process:
        process.wait_until_ready(lambda timeout_s: asyncio.run(_wait_until_serving(address, token, timeout_s)))
        asyncio.run(_populate_over_grpc(address, tokens, token, bar))
    with LocalCache.open(cache) as opened:
        if damaged := verify(opened).damaged:
            raise DataError(f"{len(damaged)} records of the cache are damaged, the first is {damaged[0]}")
        return count(opened)


async def _wait_until_serving(address: str, token: str, timeout_s: float) -> None:
    async with TeacherClient(address, token) as teacher:
        await teacher.wait_until_serving(timeout_s)


async def _populate_over_grpc(address: str, tokens: Path, token: str, bar: Bar) -> None:
    async with TeacherClient(address, token) as teacher:
        total, rows = count_tokens_rows(tokens), 0
        trajectories = ((t.trajectory_id, t.token_ids, t.positions) for t in read_tokens(tokens))
        outcomes: Counter[Outcome] = Counter()
        async for item in teacher.populate(trajectories, data=read_data_identity(tokens)):
            if item.outcome is Outcome.REFUSED:
                raise DataError(f"the teacher refuses trajectory {item.trajectory_id!r}: {item.reason}")
            outcomes[item.outcome] += 1
            rows += item.num_rows
            bar.update(outcomes.total(), total, f"{rows:,} supervised tokens")


def _distil(
    config: DemoConfig, student: Path, tokens: Path, out: Path, token: str, bar: Bar
) -> tuple[RunBody, list[dict[str, Any]]]:
    """Serve the trainer, start a run over REST, follow it to its end."""
    recipe = {
        "student": str(student.resolve()),
        "tokens": str(tokens.resolve()),
        "cache": str((out / "cache").resolve()),
        "max_prompt_tokens": config.views.max_prompt_tokens,
        "seed": config.seed,
        "checkpoint_every": config.distill.evaluate_every,
        **config.distill.model_dump(mode="json"),
    }
    write_atomically(out / "recipes" / "demo.yaml", yaml.safe_dump(recipe, sort_keys=False).encode())
    port = free_port()
    arguments = ["--recipes", str(out / "recipes"), "--runs", str(out / "runs"), "--port", str(port)]
    with (
        service("trainer", arguments, log=out / "logs" / "trainer.txt", token=token) as process,
        RunClient(f"http://127.0.0.1:{port}", token) as trainer,
    ):
        process.wait_until_ready(trainer.wait_until_ready)
        run = _follow(trainer, trainer.start(RunRequest(recipe="demo")), process, bar)
        if run.state != "done":
            raise ServiceError(f"the training run {run.state}: {run.reason}; see {_run_folder(out, run) / 'log.txt'}")
        metrics = trainer.metrics(run.id).metrics
    with new_directory(out / "bundle") as temporary:
        shutil.copytree(_run_folder(out, run) / "bundle", temporary, dirs_exist_ok=True)
    return run, metrics


def _follow(trainer: RunClient, started: RunBody, process: ServiceProcess, bar: Bar) -> RunBody:
    run = started
    try:
        for run in trainer.follow(started.id):
            bar.update(run.step, run.num_steps, run.progress_note)
    except ServiceError:
        process.require_alive()  # the last line of its log says more than a refused connection
        raise
    return run


def _adapter(source: Path, out: Path, token: str) -> str:
    """Serve the bundle, turn the probe's task into an adapter over REST, download it; returns the task."""
    prompt = _probe_prompt(source, out)
    port = free_port()
    arguments = ["--bundle", str(out / "bundle"), "--store", str(out / "adapters"), "--port", str(port)]
    with (
        service("adapter-api", arguments, log=out / "logs" / "adapter-api.txt", token=token) as process,
        AdapterClient(f"http://127.0.0.1:{port}", token) as client,
    ):
        process.wait_until_ready(client.wait_until_ready)
        client.download(client.create(PromptBody(prompt=prompt)), out / "adapter")
    return prompt


def _probe_prompt(source: Path, out: Path) -> str:
    """The task of the trajectory that the training process wrote its probe for."""
    from safetensors import safe_open

    (probe,) = (out / "runs").glob("*/probe.safetensors")
    with safe_open(probe, framework="np") as file:
        trajectory_id = file.metadata()["trajectory_id"]
    return next(dialogue_of(row).task for row in read_rows(source) if row["trajectory_id"] == trajectory_id)


def _run_folder(out: Path, run: RunBody) -> Path:
    return out / "runs" / run.id
