"""Two synthetic worlds in which it is known what conditioning on the prompt is worth.

    prompt    the teacher's answer depends on what the prompt names, and on nothing else that the student cannot see
    constant  the same prompts and tokens, and one answer whatever the prompt says

A sample has a latent: one value for each of a few attributes. Attribute c rules the tokens of class c: value v says by
which permutation of its class a token is answered. The prompt names the values, each once, among noise. The tokens of
a sequence are drawn independently of the latent and of each other, so nothing in the student's own context gives it
away, and the teacher's row for an answer is exact: a few kept ids and the mass of all others.

Held out are combinations: every value of every attribute is seen in training, the held-out tuples never are. Additive
rules, such as a shift by 8 a + b, would be the wrong test, since a network learns those by heart long before it
composes them (Power et al., arXiv:2201.02177).

The frozen student is trained beforehand on the mean of the teacher over all latents. It then knows all there is to know
without the prompt, and what remains between it and the teacher is what the prompt alone can close: a static adapter
has nothing to gain in the first world, and everything in the second, where the student's mean is not the answer.

Legend of shape suffixes: B samples, T tokens, P prompt tokens, N rows (B times T), K kept ids, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_student import tiny_config, write_tokenizer
from torch import Tensor, nn
from transformers import Qwen3NextForCausalLM

from hyperagent.cache.hot import HotUse
from hyperagent.model.adapter import AdapterWeights, LoRAPair
from hyperagent.model.hypernetwork import AgenticHyperNetwork, HyperNetworkConfig
from hyperagent.model.targets import LayerInfo, discover_target_layers
from hyperagent_trainer.adapted import AdaptedStudent
from hyperagent_trainer.batches import Batch
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.student import Student
from hyperagent_trainer.train import learning_rate_factor, make_optimizer

Kind = Literal["prompt", "constant"]

CLASS_SIZE = 16
"""Tokens of a class: ids c * 16 to c * 16 + 15."""
FIRST_NAME = 96
"""Id of the name of value 0 of attribute 0; those of the others follow."""
FIRST_NOISE = 160
"""Ids from here to the last byte mean nothing."""
NUM_IDS = 256
SEQUENCE_TOKENS = 64
PROMPT_TOKENS = 48
NAMINGS = 6
"""How often a prompt names each value; the other tokens of it are noise."""
# The answer, and three ids of the token's own class that any value may answer with; the others share the rest evenly.
KEPT_PROBABILITIES = (0.9, 0.04, 0.02, 0.01)


@dataclass(frozen=True, eq=False)
class World:
    """The rules, and which combinations are held out."""

    kind: Kind
    num_attributes: int
    num_values: int
    answers: NDArray[np.int64]
    """[attribute, value, place in the class, K]: places of the kept ids."""
    train: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]

    @classmethod
    def make(
        cls, kind: Kind, *, seed: int = 0, num_attributes: int = 2, num_values: int = 8, held_out: int = 16
    ) -> World:
        """Draw a world; `held_out` combinations are never trained on, each value of each attribute always is."""
        generator = np.random.default_rng([seed, 1])
        # The rows of a cyclic square in random order: no two values answer a token alike.
        answers = np.empty((num_attributes, num_values, CLASS_SIZE, len(KEPT_PROBABILITIES)), np.int64)
        for attribute in range(num_attributes):
            relabel = generator.permutation(CLASS_SIZE)
            shifts = generator.permutation(CLASS_SIZE)
            for value, place, kept in np.ndindex(num_values, CLASS_SIZE, len(KEPT_PROBABILITIES)):
                shift = shifts[value] if kept == 0 else shifts[num_values + kept]
                answers[attribute, value, place, kept] = relabel[(place + shift) % CLASS_SIZE]
        combinations = list(product(range(num_values), repeat=num_attributes))
        while True:
            order = generator.permutation(len(combinations))
            hidden = tuple(combinations[i] for i in order[:held_out])
            shown = tuple(combinations[i] for i in order[held_out:])
            if all({c[a] for c in shown} == set(range(num_values)) for a in range(num_attributes)):
                return cls(kind, num_attributes, num_values, answers, shown, hidden)

    def prompt(self, latent: Sequence[int], generator: np.random.Generator) -> NDArray[np.uint32]:
        """Noise with the name of each value somewhere in it, in any order."""
        ids = generator.integers(FIRST_NOISE, NUM_IDS, PROMPT_TOKENS)
        places = generator.choice(PROMPT_TOKENS, (self.num_attributes, NAMINGS), replace=False)
        for attribute, value in enumerate(latent):
            ids[places[attribute]] = FIRST_NAME + attribute * self.num_values + value
        return ids.astype(np.uint32)

    def samples(self, latents: Sequence[Sequence[int]], generator: np.random.Generator) -> tuple[Batch, list[NDArray[np.uint32]]]:
        """A batch with one sequence per latent, every token of it supervised, and the samples' prompts."""
        shape = (len(latents), SEQUENCE_TOKENS)
        token_ids = generator.integers(0, self.num_attributes * CLASS_SIZE, shape)
        attribute, place = np.divmod(token_ids, CLASS_SIZE)
        rule = np.asarray(latents) if self.kind == "prompt" else np.zeros((len(latents), self.num_attributes), np.int64)
        value = np.take_along_axis(rule, attribute, axis=1)
        ids = attribute[..., None] * CLASS_SIZE + self.answers[attribute, value, place]
        n, k = token_ids.size, len(KEPT_PROBABILITIES)
        batch = Batch(
            indices=tuple(range(len(latents))),
            token_ids_BT=torch.from_numpy(token_ids),
            num_tokens=n,
            sample_N=torch.arange(len(latents)).repeat_interleave(SEQUENCE_TOKENS),
            index_N=torch.arange(SEQUENCE_TOKENS).repeat(len(latents)),
            ids_NK=torch.from_numpy(ids.reshape(n, k)),
            logprobs_NK=torch.tensor(KEPT_PROBABILITIES).log().expand(n, k).contiguous(),
            tail_logmass_N=torch.full((n,), math.log(1 - sum(KEPT_PROBABILITIES))),
            temperature=1.0,
            hot_use=HotUse(),
        )
        return batch, [self.prompt(latent, generator) for latent in latents]

    def mean_rows(self, token_ids: Tensor, vocab_size: int) -> Tensor:
        """[..., V]: the teacher's full rows averaged over all latents of the prompt world, for tokens of any shape."""
        table = torch.full((self.num_attributes * CLASS_SIZE, vocab_size), 0.0)
        rest = (1 - sum(KEPT_PROBABILITIES)) / (vocab_size - len(KEPT_PROBABILITIES))
        for attribute, value, place in np.ndindex(self.answers.shape[:3]):
            row = torch.full((vocab_size,), rest)
            row[attribute * CLASS_SIZE + self.answers[attribute, value, place]] = torch.tensor(KEPT_PROBABILITIES)
            table[attribute * CLASS_SIZE + place] += row / self.num_values
        return table[token_ids]


def train_student(folder: Path, world: World, *, num_steps: int = 150, **changes: object) -> Path:
    """A tiny student that answers with the mean over all latents, written as a folder; nothing in it knows the prompt."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(tiny_config(**changes))
    vocab_size = NUM_IDS + 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, step / 10) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        ids_BT = torch.randint(world.num_attributes * CLASS_SIZE, (8, SEQUENCE_TOKENS), generator=generator)
        logits = model(input_ids=ids_BT).logits[..., :vocab_size]
        loss = nn.functional.kl_div(
            logits.flatten(0, 1).log_softmax(-1), world.mean_rows(ids_BT, vocab_size).flatten(0, 1), reduction="batchmean"
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    return folder
