"""Train the arms of a world alike, two hypernetworks and a static LoRA, and compare them on held-out combinations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from worlds import Latent, World

from hyperagent.model.config import HyperNetworkConfig
from hyperagent.model.hypernetwork import AgenticHyperNetwork
from hyperagent.model.static_lora import StaticLoRA
from hyperagent.model.targets import discover_target_layers
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.evaluation.arms import FROZEN, OWN, SHUFFLED, STATIC, TRAINED_ON_SHUFFLED
from hyperagent_trainer.evaluation.conditioning import ConditioningReport, conditioning_report
from hyperagent_trainer.network.adapted_student import AdaptedStudent, AdapterNetwork
from hyperagent_trainer.optim.optimizer import make_optimizer, set_learning_rate
from hyperagent_trainer.student.student import Student

SAMPLES_PER_COMBINATION = 4


@dataclass(frozen=True)
class Settings:
    """Training settings of the arms of one world."""

    hypernetwork: HyperNetworkConfig
    num_steps: int
    learning_rate: float
    b_head_learning_rate_factor: float
    static_learning_rates: tuple[float, ...]
    """Learning rates to try; the best one on the held-out samples is used, which favors the baseline."""
    batch_size: int = 16
    warmup_steps: int = 20


@dataclass(frozen=True)
class Outcome:
    """The result of one world."""

    report: ConditioningReport
    static_gap_closed: dict[float, float]
    """Share of the gap that the static LoRA closes, by learning rate."""
    hypernetwork_seconds: float
    static_seconds: float


def run_world(world: World, student: Student, settings: Settings, *, seed: int) -> Outcome:
    """Train both arms on the world's training combinations and compare them on the others."""
    layers = discover_target_layers(student.model)
    held_out = [latent for latent in world.held_out for _ in range(SAMPLES_PER_COMBINATION)]
    generator = np.random.default_rng([seed, 2])
    prompts = [world.prompt(latent, generator) for latent in held_out]
    foreign = [world.prompt(_other(latent, world.held_out, generator), generator) for latent in held_out]
    samples = _Samples(world, held_out, seed)

    def hypernetwork(*, shuffled: bool) -> AdaptedStudent:
        torch.manual_seed(seed)
        network = AgenticHyperNetwork(settings.hypernetwork, layers, student.embeddings.shape[1])
        return _train(world, student, network, settings, settings.learning_rate, seed, shuffled=shuffled)

    started = time.perf_counter()
    adapted = hypernetwork(shuffled=False)
    hypernetwork_seconds = time.perf_counter() - started
    sums = {
        FROZEN: samples.kl(adapted, None),
        OWN: samples.kl(adapted, prompts),
        SHUFFLED: samples.kl(adapted, foreign),
        TRAINED_ON_SHUFFLED: samples.kl(hypernetwork(shuffled=True), prompts),
    }

    started = time.perf_counter()
    static_kl = {}
    for rate in settings.static_learning_rates:
        torch.manual_seed(seed)
        arm = StaticLoRA(layers, rank=settings.hypernetwork.rank, alpha=settings.hypernetwork.alpha)
        static_kl[rate] = samples.kl(_train(world, student, arm, settings, rate, seed), prompts)
    static_seconds = time.perf_counter() - started
    report = conditioning_report(
        {**sums, STATIC: min(static_kl.values(), key=np.sum)},
        np.full(len(held_out), samples.rows),
        held_out,
        seed=seed,
    )
    gaps = {rate: float(1 - kl.sum() / sums[FROZEN].sum()) for rate, kl in static_kl.items()}
    return Outcome(report, gaps, hypernetwork_seconds, static_seconds)


class _Samples:
    """The held-out samples, one batch each."""

    def __init__(self, world: World, latents: Sequence[Latent], seed: int) -> None:
        generator = np.random.default_rng([seed, 3])
        self._batches = [world.batch([latent], generator) for latent in latents]
        self.rows = self._batches[0].num_rows

    @torch.no_grad()
    def kl(self, adapted: AdaptedStudent, prompts: Sequence[NDArray[np.uint32]] | None) -> NDArray[np.float64]:
        """Return the summed KL of every sample in nats; None for the prompts gives that of the bare student."""
        return np.array(
            [
                float(adapted.loss_sum(batch, None if prompts is None else adapted.adapters([prompts[i]])))
                for i, batch in enumerate(self._batches)
            ]
        )


def _train(
    world: World,
    student: Student,
    network: AdapterNetwork,
    settings: Settings,
    learning_rate: float,
    seed: int,
    *,
    shuffled: bool = False,
) -> AdaptedStudent:
    """Train a network with the trainer's own parts on batches of the world; `shuffled` gives it other samples' prompts."""
    folder = student.folder
    recipe = TrainRecipe(
        student=folder,
        tokens=folder,
        cache=folder,
        num_steps=settings.num_steps,
        learning_rate=learning_rate,
        b_head_learning_rate_factor=settings.b_head_learning_rate_factor,
        warmup_steps=settings.warmup_steps,
    )
    adapted = AdaptedStudent(student, network)
    optimizer = make_optimizer(network, recipe)
    generator, shuffler = np.random.default_rng([seed, 4]), np.random.default_rng([seed, 5])
    for step in range(1, settings.num_steps + 1):
        set_learning_rate(optimizer, step, recipe)
        latents = [world.train[i] for i in generator.integers(len(world.train), size=settings.batch_size)]
        batch = world.batch(latents, generator)
        prompted = (
            [world.train[i] for i in shuffler.integers(len(world.train), size=len(latents))] if shuffled else latents
        )
        adapters = adapted.adapters([world.prompt(latent, generator) for latent in prompted])
        loss = adapted.loss_sum(batch, adapters) / batch.num_rows
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.max_grad_norm)
        optimizer.step()
    return adapted


def _other(latent: Latent, pool: Sequence[Latent], generator: np.random.Generator) -> Latent:
    """Draw one of the combinations of the pool that have the fewest values in common with `latent`."""
    common = [sum(a == b for a, b in zip(latent, other, strict=True)) for other in pool]
    most_foreign = [other for other, n in zip(pool, common, strict=True) if n == min(common)]
    return most_foreign[int(generator.integers(len(most_foreign)))]


_SHAPE = HyperNetworkConfig(
    width=64, num_latents=8, encoder_blocks=2, generator_blocks=1, num_heads=4, rank=8, alpha=16
)
PROMPT_SETTINGS = Settings(
    hypernetwork=_SHAPE,
    num_steps=900,
    learning_rate=5e-4,
    b_head_learning_rate_factor=30.0,
    static_learning_rates=(1e-3, 1e-2),
)
CONSTANT_SETTINGS = replace(PROMPT_SETTINGS, num_steps=300)
