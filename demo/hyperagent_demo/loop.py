"""The loop: trajectories in, a prompt-conditioned LoRA out, every arrow a real process, port and file.

The demo starts the services as a user would and talks to them over the network only. What it writes to OUT:

    demo.json         the configuration              cache/      the teacher's cache
    sample.parquet    trajectories, if none given    recipes/    the trainer's recipes
    tokenizer/        likewise                       runs/       the hypernetwork's run
    tokens.parquet    trajectories as token ids      controls/   the static run, and the one on shuffled prompts
    foreign*          the teacher check              bundle/     what the adapter service serves
    evaluation.*      the comparison of the runs     adapters/   what it has generated
    report.json .png  the result                     adapter/    one of them, downloaded; other-adapter/ likewise
    logs/             one per process                example/    the condition that it was made for
    teacher, student  links to the pre-trained models
    previous/         what former demos wrote here, by time
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperagent.cache.maintenance.stats import CacheStats
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import count_tokens_rows
from hyperagent.data.pipeline.selection import Selection
from hyperagent.data.pipeline.split import SplitSettings
from hyperagent.data.pipeline.tokenize_dataset import JoinedFiles, TokenizeReport, TokenizeSettings, tokenize_file
from hyperagent.storage.files import new_directory, write_atomically
from hyperagent_demo.adapters import Example, request_adapters
from hyperagent_demo.config import DemoConfig
from hyperagent_demo.distill import Distilled, distill
from hyperagent_demo.folder import MARKER, keep_former_results, move_into, require_demo_folder, temporary_folder
from hyperagent_demo.generate_texts import TextsJob
from hyperagent_demo.peft_check import PeftCheckJob
from hyperagent_demo.populate import populate
from hyperagent_demo.pretraining.pretrain import PretrainedModels, pretrain_models
from hyperagent_demo.processes import run_command, run_worker
from hyperagent_demo.sample.chores import write_rules_sample
from hyperagent_demo.sample.generate import write_sample
from hyperagent_demo.stages import Stages
from hyperagent_demo.teacher_check import check_teacher, write_foreign_tokens
from hyperagent_demo.tokenizer import tokenizer_texts, train_tokenizer


@dataclass(frozen=True)
class LoopResult:
    """What the loop measured."""

    source: Path
    tokenized: TokenizeReport
    models: PretrainedModels
    cache: CacheStats
    teacher_check: dict[str, Any]
    distilled: Distilled
    evaluation: dict[str, Any]
    """Contents of evaluation.json."""
    example: Example
    peft: dict[str, float]
    texts: dict[str, str]
    """Text that the student writes for the example, by arm."""


def run_loop(
    config: DemoConfig,
    *,
    data: Path | None,
    extra: Path | None,
    tokenizer: Path | None,
    out: Path,
    model_store: Path,
    stages: Stages,
) -> LoopResult:
    """Run every stage.

    Args:
        data: trajectories in Parquet; without, the sample is generated.
        extra: file of extra texts; given if and only if the configuration's condition contains them.
        tokenizer: folder of a tokenizer with a chat template; without, one is trained on the data.
        model_store: keeps pre-trained models from one run to the next.

    Raises:
        HyperagentError: an input is wrong or a process failed; says which log to read.
    """
    require_demo_folder(out)
    with temporary_folder(beside=out) as staging:
        source, tokenizer, tokenized = _prepare(config, data, extra, tokenizer, staging, stages)
        # Only now, because everything up to here can fail by an input.
        keep_former_results(out)
        move_into(out, staging)
        write_atomically(out / MARKER, config.model_dump_json(indent=2).encode() + b"\n")
        source, tokenizer = (_moved(path, staging, out) for path in (source, tokenizer))
    tokens, cache = out / "tokens.parquet", out / "cache"
    models = pretrain_models(config, tokens=tokens, tokenizer=tokenizer, store=model_store, out=out, stages=stages)

    for name, folder in (("teacher", models.teacher), ("student", models.student)):
        # Relative, so that the two folders can be moved together.
        (out / name).symlink_to(os.path.relpath(folder, out))
    token = secrets.token_urlsafe(32)
    with stages.stage("populate", total=count_tokens_rows(tokens)) as bar:
        log = out / "logs" / "teacher.txt"
        stats = populate(config, models.teacher, tokens=tokens, cache=cache, log=log, token=token, bar=bar)
    with stages.stage("teacher check") as bar:
        check = check_teacher(config, models.teacher, out=out, token=token, bar=bar)
    with stages.stage("distill") as bar:
        distilled = distill(config, models.student, tokens=tokens, cache=cache, out=out, token=token, bar=bar)
    run = distilled.folder
    with new_directory(out / "bundle") as temporary:
        shutil.copytree(run / "bundle", temporary, dirs_exist_ok=True)
    with stages.stage("evaluate"):
        evaluation = _evaluate(distilled, out)
    with stages.stage("adapter"):
        example = request_adapters(config, source=source, extra=extra, tokens=tokens, run=run, out=out, token=token)
    with stages.stage("peft check"):
        job = PeftCheckJob(student=models.student, adapter=example.adapter, probe=run / "probe.safetensors")
        peft = _worker("hyperagent_demo.peft_check", "peft_check", job.model_dump_json(), out)
    with stages.stage("texts"):
        texts = _worker("hyperagent_demo.generate_texts", "texts", _texts_job(example, models).model_dump_json(), out)
    return LoopResult(source, tokenized, models, stats, check, distilled, evaluation, example, peft, texts)


def _prepare(
    config: DemoConfig, data: Path | None, extra: Path | None, tokenizer: Path | None, place: Path, stages: Stages
) -> tuple[Path, Path, TokenizeReport]:
    """Write the trajectories, the tokenizer, and the token ids with their foreign conditions to the folder `place`.

    Returns:
        The trajectories, the tokenizer's folder, and the report on tokenizing.
    """
    source, tokenizer = _trajectories(config, data, tokenizer, place, stages)
    settings = TokenizeSettings(
        views=config.views,
        selection=Selection(sample=config.max_rows, seed=config.seed),
        split=SplitSettings(held_out_share=config.held_out_share, seed=config.seed),
    )
    with stages.stage("tokenize") as bar:
        tokenized = tokenize_file(
            source,
            place / "tokens.parquet",
            ChatTokenizer(tokenizer),
            settings,
            joined=JoinedFiles(extra=extra),
            reading=bar.update,
            tokenizing=bar.update,
        )
    # Before anything is trained, because it fails where there is nothing to distill.
    write_foreign_tokens(config, source=source, extra=extra, tokenizer=tokenizer, out=place)
    return source, tokenizer, tokenized


def _moved(path: Path, before: Path, after: Path) -> Path:
    return after / path.relative_to(before) if path.is_relative_to(before) else path


def _trajectories(
    config: DemoConfig, data: Path | None, tokenizer: Path | None, out: Path, stages: Stages
) -> tuple[Path, Path]:
    """Return the trajectories and the tokenizer: the user's, or the demo's own."""
    source = data or out / "sample.parquet"
    if data is None:
        write = write_rules_sample if config.sample == "rules" else write_sample
        with stages.stage("sample") as bar:
            write(source, seed=config.seed, rows=config.sample_rows, progress=bar.update)
    if tokenizer is None:
        tokenizer = out / "tokenizer"
        with stages.stage("tokenizer"):
            train_tokenizer(tokenizer_texts(source), tokenizer, vocab_size=config.vocab_size)
    return source, tokenizer


def _evaluate(distilled: Distilled, out: Path) -> dict[str, Any]:
    """Compare the runs on the held-out repositories with `hyperagent evaluate`."""
    arguments = ["evaluate", str(distilled.folder), "--static", str(distilled.static)]
    arguments += ["--trained-on-shuffled", str(distilled.trained_on_shuffled), "--out", str(out)]
    arguments += ["--teacher-check", str(out / "teacher_check.json")]
    arguments += ["--dependent-rows", str(out / "dependent_rows.parquet")]
    # One thread: more do not speed up models this small, and wait for each other where another process is busy.
    run_command(arguments, log=out / "logs" / "evaluate.txt", threads=1)
    evaluation: dict[str, Any] = json.loads((out / "evaluation.json").read_bytes())
    return evaluation


def _texts_job(example: Example, models: PretrainedModels) -> TextsJob:
    trajectory, first = example.trajectory, int(example.trajectory.student_positions[0])
    turn_end = int(trajectory.student_ids[trajectory.student_positions[-1]])
    return TextsJob(
        student=models.student,
        adapters={"own": example.adapter, "shuffled": example.other_adapter},
        token_ids=trajectory.student_ids[:first].tolist(),
        end_id=turn_end,
    )


def _worker(module: str, name: str, job: str, out: Path) -> dict[str, Any]:
    file = out / "logs" / f"{name}.json"
    write_atomically(file, job.encode())
    return run_worker(module, file, log=out / "logs" / f"{name}.txt", threads=2)
