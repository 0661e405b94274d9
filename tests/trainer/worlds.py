"""Two synthetic worlds in which the gain from conditioning on the prompt is known.

    prompt    the teacher's answer depends on the values that the prompt names, and on nothing else hidden from the student
    constant  the same prompts and tokens, but the answer does not depend on the prompt

A sample has a latent: one value for each attribute. Attribute c determines the answers to the tokens of class c: value v
gives each group of the class's tokens its own answer, an id of that class. The prompt names the values, among noise. The
tokens of a sequence are drawn independently of the latent and of each other, so the student's own context does not reveal
the latent, and the teacher's row is exact: the kept ids and the mass of all others.

Combinations are held out: every value of every attribute occurs in training, but the held-out tuples never do. Additive
rules, such as a shift by 8 a + b, would be the wrong test, since a network memorizes them long before it learns to compose
them (Power et al., arXiv:2201.02177).

The frozen student is pretrained on the mean of the teacher over all latents. It then knows everything that does not need
the prompt, and only the prompt can close the remaining gap to the teacher: a static adapter has nothing to gain in the
first world, and everything in the second, where that mean is not the answer.

Legend of shape suffixes: B samples, T tokens, P prompt tokens, N rows (B times T), K kept ids, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_student import tiny_config, write_tokenizer
from torch import Tensor, nn
from transformers import Qwen3NextForCausalLM

from hyperagent.cache.hot_tier import HotTierStats
from hyperagent_trainer.data.dataset import Batch
from hyperagent_trainer.data.teacher_rows import TeacherRows

Kind = Literal["prompt", "constant"]
Latent = tuple[int, ...]
"""One value for each attribute."""

CLASS_SIZE = 16
"""Tokens of a class: ids c * 16 to c * 16 + 15."""
FIRST_NAME = 96
"""Id of the name of value 0 of attribute 0; the names of the other values follow."""
FIRST_NOISE = 160
"""First of the ids without a meaning, which reach to the last byte."""
NUM_IDS = 256
VOCAB_SIZE = NUM_IDS + 2
SEQUENCE_TOKENS = 64
PROMPT_TOKENS = 48
NAMINGS = 6
"""How often a prompt names each value; its other tokens are noise."""
# The answer, and three ids of the token's own class that depend on no value; all other ids share the rest evenly.
KEPT_PROBABILITIES = (0.9, 0.04, 0.02, 0.01)


@dataclass(frozen=True, eq=False)
class World:
    """The rules of a world, and the combinations that are held out."""

    kind: Kind
    num_attributes: int
    num_values: int
    answers: NDArray[np.int64]
    """Places of the kept ids, shape [attribute, value, place in the class, K]."""
    train: tuple[Latent, ...]
    held_out: tuple[Latent, ...]

    @classmethod
    def make(
        cls,
        kind: Kind,
        *,
        seed: int = 0,
        num_attributes: int = 3,
        num_values: int = 4,
        num_groups: int = 2,
        held_out: int = 16,
    ) -> World:
        """Draw a world; `held_out` combinations do not occur in training, but every value of every attribute does."""
        generator = np.random.default_rng([seed, 1])
        k = len(KEPT_PROBABILITIES)
        answers = np.empty((num_attributes, num_values, CLASS_SIZE, k), np.int64)
        for attribute in range(num_attributes):
            # No two values give a group the same answer, and no answer is one of the ids that depend on no value.
            order = np.stack([generator.permutation(CLASS_SIZE) for _ in range(num_groups)])
            for value, place in np.ndindex(num_values, CLASS_SIZE):
                of_group = order[place % num_groups]
                answers[attribute, value, place] = [of_group[value], *of_group[num_values : num_values + k - 1]]
        combinations = list(product(range(num_values), repeat=num_attributes))
        while True:
            shuffled = [combinations[i] for i in generator.permutation(len(combinations))]
            hidden, shown = shuffled[:held_out], shuffled[held_out:]
            if all({latent[a] for latent in shown} == set(range(num_values)) for a in range(num_attributes)):
                return cls(kind, num_attributes, num_values, answers, tuple(shown), tuple(hidden))

    def prompt(self, latent: Latent, generator: np.random.Generator) -> NDArray[np.uint32]:
        """Draw a prompt: noise that contains the names of the values at random places, in any order."""
        ids = generator.integers(FIRST_NOISE, NUM_IDS, PROMPT_TOKENS)
        places = generator.permutation(PROMPT_TOKENS)
        for attribute, value in enumerate(latent):
            ids[places[attribute * NAMINGS : (attribute + 1) * NAMINGS]] = (
                FIRST_NAME + attribute * self.num_values + value
            )
        return ids.astype(np.uint32)

    def batch(self, latents: Sequence[Latent], generator: np.random.Generator) -> Batch:
        """Draw one sequence per latent; every token is supervised."""
        token_ids = generator.integers(0, self.num_attributes * CLASS_SIZE, (len(latents), SEQUENCE_TOKENS))
        attribute, place = np.divmod(token_ids, CLASS_SIZE)
        rule = np.asarray(latents) if self.kind == "prompt" else np.zeros((len(latents), self.num_attributes), np.int64)
        value = np.take_along_axis(rule, attribute, axis=1)
        ids = attribute[..., None] * CLASS_SIZE + self.answers[attribute, value, place]
        n, k = token_ids.size, len(KEPT_PROBABILITIES)
        return Batch(
            indices=tuple(range(len(latents))),
            token_ids_BT=torch.from_numpy(token_ids),
            num_tokens=n,
            sample_N=torch.arange(len(latents)).repeat_interleave(SEQUENCE_TOKENS),
            index_N=torch.arange(SEQUENCE_TOKENS).repeat(len(latents)),
            rows=TeacherRows(
                ids_NK=torch.from_numpy(ids.reshape(n, k)),
                logprobs_NK=torch.tensor(KEPT_PROBABILITIES).log().expand(n, k).contiguous(),
                tail_logmass_N=torch.full((n,), math.log(1 - sum(KEPT_PROBABILITIES))),
                target_ids_N=torch.from_numpy(ids.reshape(n, k)[:, 0].copy()),
            ),
            hot_tier_stats=HotTierStats(),
        )

    def mean_rows(self) -> Tensor:
        """Return the teacher's whole rows averaged over the latents of the prompt world, shape [tokens of all classes, V]."""
        rest = (1 - sum(KEPT_PROBABILITIES)) / (VOCAB_SIZE - len(KEPT_PROBABILITIES))
        rows = torch.zeros(self.num_attributes * CLASS_SIZE, VOCAB_SIZE)
        for attribute, value, place in np.ndindex(self.answers.shape[:3]):
            row = torch.full((VOCAB_SIZE,), rest)
            row[attribute * CLASS_SIZE + self.answers[attribute, value, place]] = torch.tensor(KEPT_PROBABILITIES)
            rows[attribute * CLASS_SIZE + place] += row / self.num_values
        return rows

    @property
    def information(self) -> float:
        """Return the worth of the latent in nats per token: mean KL of the teacher from its own mean over the latents."""
        mean = self.mean_rows()
        kept = torch.tensor(KEPT_PROBABILITIES)
        total = 0.0
        for attribute, value, place in np.ndindex(self.answers.shape[:3]):
            token = attribute * CLASS_SIZE + place
            ids = attribute * CLASS_SIZE + torch.from_numpy(self.answers[attribute, value, place])
            q = mean[token]
            q_tail = 1 - q[ids].sum()
            p_tail = 1 - kept.sum()
            total += float((kept * (kept / q[ids]).log()).sum() + p_tail * (p_tail / q_tail).log())
        return total / self.answers[..., 0].size


def train_student(folder: Path, world: World, *, num_steps: int = 240, **changes: Any) -> Path:
    """Train a tiny student that answers with the mean over all latents and has never seen a prompt, and write it to a folder."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(tiny_config(**changes))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    rows_of_token = world.mean_rows()
    for step in range(1, num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, step / 10) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        ids_BT = torch.randint(len(rows_of_token), (8, SEQUENCE_TOKENS), generator=generator)
        logits = model(input_ids=ids_BT).logits[..., :VOCAB_SIZE].flatten(0, 1)
        loss = nn.functional.kl_div(logits.log_softmax(-1), rows_of_token[ids_BT].flatten(0, 1), reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    return folder
