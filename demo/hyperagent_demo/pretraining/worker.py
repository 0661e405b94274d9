"""Pre-train one tiny model: `python -m hyperagent_demo.pretraining.worker JOB.json`, one JSON line of progress per step.

A random teacher has nothing to teach, and the demo must run without network access. Therefore teacher and student are
first pre-trained on the training split, each on the view that it will see later; the teacher is larger and trains longer.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hyperagent.config import StrictModel
from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import HELD_OUT, TRAIN, TokenizedTrajectory, read_tokens
from hyperagent.model.bundle import copy_tokenizer
from hyperagent.storage.files import new_directory
from hyperagent_demo.config import PretrainConfig, Role
from hyperagent_demo.pretraining.models import CompactVocabulary, build_model, expand_vocabulary

_IGNORED = -100
_WARMUP_STEPS = 20


class PretrainJob(StrictModel):
    """Contents of JOB.json."""

    role: Role
    config: PretrainConfig
    tokens: Path
    tokenizer: Path
    max_tokens: int
    seed: int
    target: Path
    """Folder to write the model and its tokenizer to."""


class PretrainResult(StrictModel):
    """Contents of `pretraining.json` in the model's folder."""

    steps: int
    seconds: float
    held_out_nll: float
    """Negative log-likelihood on the held-out split, in nats per supervised token."""
    parameters: int
    """Number of parameters, with the full vocabulary."""


def pretrain(job: PretrainJob) -> PretrainResult:
    """Train, evaluate, expand the vocabulary, and write the folder atomically."""
    started = time.monotonic()
    torch.manual_seed(job.seed)
    tokenizer = ChatTokenizer(job.tokenizer)
    train, held_out = (
        [_seen_by(job.role, trajectory) for trajectory in read_tokens(job.tokens, split=split)]
        for split in (TRAIN, HELD_OUT)
    )
    # The same for both roles: the student's view has no token that the teacher's lacks.
    used = np.concatenate([trajectory.token_ids for trajectory in read_tokens(job.tokens, split=TRAIN)])
    vocabulary = CompactVocabulary(used, tokenizer.vocab_size)
    model = build_model(job.role, job.config, vocab_size=len(vocabulary), max_tokens=job.max_tokens)
    limit = math.inf if job.config.max_seconds is None else job.config.max_seconds
    steps = _train(job, model, vocabulary, train, deadline=started + limit)
    held_out_nll = _supervised_nll(model, vocabulary, held_out)
    expand_vocabulary(model, vocabulary)
    result = PretrainResult(
        steps=steps,
        seconds=time.monotonic() - started,
        held_out_nll=held_out_nll,
        parameters=sum(p.numel() for p in model.parameters()),
    )
    with new_directory(job.target) as temporary:
        model.save_pretrained(temporary)
        copy_tokenizer(job.tokenizer, temporary)
        (temporary / "pretraining.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return result


@dataclass(frozen=True, eq=False)
class _Seen:
    """A trajectory in one role's view."""

    ids: NDArray[np.uint32]
    """Token ids, shape [T]."""
    positions: NDArray[np.int64]
    """Indices of the supervised tokens, shape [N]."""


def _seen_by(role: Role, trajectory: TokenizedTrajectory) -> _Seen:
    if role == "teacher":
        return _Seen(trajectory.token_ids, trajectory.positions.astype(np.int64))
    return _Seen(trajectory.student_ids, trajectory.student_positions.astype(np.int64))


def _train(
    job: PretrainJob,
    model: PreTrainedModel,
    vocabulary: CompactVocabulary,
    train: Sequence[_Seen],
    *,
    deadline: float,
) -> int:
    """Run optimizer steps until they are done or time is up, and return their number."""
    config = job.config
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    batches = _batches(train, config.batch_size, np.random.default_rng(job.seed))
    for step in range(1, config.num_steps + 1):
        if time.monotonic() > deadline:
            return step - 1
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.num_steps)
        batch = next(batches)
        ids = pad_sequence([vocabulary.encode(t.ids) for t in batch], batch_first=True)
        targets = pad_sequence(
            [_targets(t, vocabulary, supervised_only=config.supervised_only) for t in batch],
            batch_first=True,
            padding_value=_IGNORED,
        )
        loss = F.cross_entropy(_logits(model, vocabulary, ids[:, :-1]).flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _print({"step": step, "num_steps": config.num_steps, "loss": loss.item()})
    return config.num_steps


def _targets(trajectory: _Seen, vocabulary: CompactVocabulary, *, supervised_only: bool) -> Tensor:
    """Return the compact ids [T] to predict, with the others ignored."""
    targets = vocabulary.encode(trajectory.ids)
    if not supervised_only:
        return targets
    ignored = torch.ones(len(targets), dtype=torch.bool)
    ignored[trajectory.positions] = False
    return targets.masked_fill(ignored, _IGNORED)


def _batches(trajectories: Sequence[_Seen], batch_size: int, generator: np.random.Generator) -> Iterator[list[_Seen]]:
    """Yield an endless stream of batches of similar lengths, in random order."""
    while True:
        # Trajectories of similar length share a batch; the noise varies the batches between epochs.
        noisy = sorted(trajectories, key=lambda t: len(t.ids) * generator.uniform(0.8, 1.25))
        groups = [noisy[i : i + batch_size] for i in range(0, len(noisy), batch_size)]
        for place in generator.permutation(len(groups)):
            yield groups[place]


def _schedule(step: int, num_steps: int) -> float:
    if step <= _WARMUP_STEPS:
        return step / _WARMUP_STEPS
    progress = (step - _WARMUP_STEPS) / max(1, num_steps - _WARMUP_STEPS)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _logits(model: PreTrainedModel, vocabulary: CompactVocabulary, ids: Tensor) -> Tensor:
    return vocabulary.full_logits(model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def _supervised_nll(model: PreTrainedModel, vocabulary: CompactVocabulary, held_out: Sequence[_Seen]) -> float:
    """Return the mean negative log-likelihood of the held-out split's supervised tokens, in nats."""
    model.eval()
    total, count = 0.0, 0
    for trajectory in held_out:
        ids, positions = vocabulary.encode(trajectory.ids), torch.from_numpy(trajectory.positions)
        logprobs = _logits(model, vocabulary, ids[None, :-1])[0].log_softmax(-1)[positions - 1]
        nll = -logprobs.gather(1, ids[positions, None])[:, 0]
        # The probability of "other" is divided equally among the unused tokens.
        nll += math.log(max(vocabulary.num_others, 1)) * (ids[positions] == len(vocabulary) - 1)
        total, count = total + float(nll.sum()), count + len(positions)
    return total / count


def _print(line: dict[str, float | int]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    pretrain(PretrainJob.model_validate_json(Path(sys.argv[1]).read_bytes()))
