"""Provide the demo's two models: load them from the store, or pre-train them in two parallel processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from hyperagent.identity import canonical_json
from hyperagent.storage.files import write_atomically
from hyperagent_demo.config import DemoConfig, PretrainConfig, Role
from hyperagent_demo.pretraining.worker import PretrainJob, PretrainResult
from hyperagent_demo.processes import run_worker
from hyperagent_demo.stages import Bar, Stages


@dataclass(frozen=True)
class PretrainedModels:
    """Folders of the two models, and the results of their pre-training."""

    teacher: Path
    student: Path
    results: dict[Role, PretrainResult]


def pretrain_models(
    config: DemoConfig, *, tokens: Path, tokenizer: Path, store: Path, out: Path, stages: Stages
) -> PretrainedModels:
    """Return both models for these tokens, from the `store` if it has them.

    Raises:
        ServiceError: a pre-training process failed; the message names its log.
    """
    configs: dict[Role, PretrainConfig] = {"teacher": config.teacher, "student": config.student}
    folders = {role: store / _key(role, model, config, tokens) for role, model in configs.items()}
    missing = [role for role in configs if not (folders[role] / "pretraining.json").is_file()]
    if missing:
        with stages.stage("pre-train", total=sum(configs[role].num_steps for role in missing)) as bar:
            _pretrain(config, {role: configs[role] for role in missing}, folders, tokens, tokenizer, out, bar)
    results = {
        role: PretrainResult.model_validate_json((folder / "pretraining.json").read_bytes())
        for role, folder in folders.items()
    }
    return PretrainedModels(folders["teacher"], folders["student"], results)


def _pretrain(
    config: DemoConfig,
    models: dict[Role, PretrainConfig],
    folders: dict[Role, Path],
    tokens: Path,
    tokenizer: Path,
    out: Path,
    bar: Bar,
) -> None:
    """Run one single-threaded process per model: two small models train faster in parallel than in sequence."""
    last: dict[Role, dict[str, Any]] = {}
    total = sum(model.num_steps for model in models.values())

    def run(role: Role) -> None:
        def on_line(line: dict[str, Any]) -> None:
            last[role] = line
            note = " · ".join(f"{name} loss {seen['loss']:.2f}" for name, seen in sorted(last.items(), reverse=True))
            bar.update(sum(seen["step"] for seen in last.values()), total, note)

        job = PretrainJob(
            role=role,
            config=models[role],
            tokens=tokens,
            tokenizer=tokenizer,
            max_tokens=config.views.max_tokens,
            seed=config.seed,
            target=folders[role],
        )
        job_file = out / "logs" / f"pretrain_{role}.json"
        write_atomically(job_file, job.model_dump_json(indent=2).encode() + b"\n")
        log = out / "logs" / f"pretrain_{role}.txt"
        run_worker("hyperagent_demo.pretraining.worker", job_file, log=log, threads=1, on_line=on_line)

    with ThreadPoolExecutor(len(models)) as pool:
        for future in [pool.submit(run, role) for role in models]:
            future.result()


def _key(role: Role, model: PretrainConfig, config: DemoConfig, tokens: Path) -> str:
    """Return the name of a pre-trained model: a digest of everything that determines its weights."""
    content = {
        "role": role,
        "model": model.model_dump(mode="json"),
        "seed": config.seed,
        "max_tokens": config.views.max_tokens,
        "tokens": blake3(tokens.read_bytes()).hexdigest(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    return f"{role}-{blake3(canonical_json(content)).hexdigest()[:16]}"
