"""One training run, from recipe to bundle: the loop and nothing else."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import tee

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import nn

from hyperagent.cache.base import CacheReader
from hyperagent.cache.hot_tier import HotTier
from hyperagent.cache.remote import open_for_reading
from hyperagent.data.files.tokens_file import HELD_OUT, HELD_OUT_TASKS, TRAIN, has_split
from hyperagent.errors import DataError
from hyperagent.files import write_atomically
from hyperagent_trainer.checkpoint.best import BestEvaluation
from hyperagent_trainer.checkpoint.manager import CheckpointStore
from hyperagent_trainer.config import AttentionName, TrainRecipe
from hyperagent_trainer.data.cost import StepCost
from hyperagent_trainer.data.dataset import Batch, DistillationData, load_split
from hyperagent_trainer.data.schedule import StepPlan, batches_from, plan_step
from hyperagent_trainer.distributed import Ranks, full_tensor, init_distributed
from hyperagent_trainer.evaluation.adapter_statistics import adapter_statistics, gradient_norms, weight_norms
from hyperagent_trainer.evaluation.evaluate import ADAPTER, Evaluation
from hyperagent_trainer.export.export import export, make_probe
from hyperagent_trainer.loss import default_workspace_bytes
from hyperagent_trainer.network.adapted_student import AdaptedStudent, AdapterNetwork
from hyperagent_trainer.network.build import assemble, describe, read_warm_start, shard_network, whole_network
from hyperagent_trainer.optim.ema import WeightAverage
from hyperagent_trainer.preflight.memory import MemoryBudget, peak_memory_bytes
from hyperagent_trainer.preflight.run import run_preflight
from hyperagent_trainer.report import Check
from hyperagent_trainer.runs.folder import RunFolder, RunStatus
from hyperagent_trainer.student.activation_checkpoint import RoutingWatch, recomputation
from hyperagent_trainer.student.attention import Attention, agreed, choose_attention, earlier_choice
from hyperagent_trainer.student.student import Student
from hyperagent_trainer.training.loggers import Loggers, require_installed
from hyperagent_trainer.training.reporter import RunReporter, last_held_out_kl
from hyperagent_trainer.training.run_control import RunControl
from hyperagent_trainer.training.step import accumulate_gradients

log = structlog.get_logger()

_STATISTICS_PROMPTS = 8


def train(recipe: TrainRecipe, folder: RunFolder, stop: threading.Event, *, redis_url: str | None = None) -> None:
    """Train until the recipe's last step, or save and return early once `stop` is set on any rank.

    Resumes from the folder's checkpoint if there is one. Under torchrun, every process calls it.

    Args:
        redis_url: the cache's hot tier, if there is one.

    Raises:
        HyperagentError: the recipe's inputs are missing, damaged, or do not belong together.
    """
    with init_distributed() as ranks:
        if ranks.is_first:
            folder.write_status(RunStatus(state="loading", num_steps=recipe.num_steps))
        require_installed(recipe.loggers)
        dtype = getattr(torch, recipe.student_dtype)
        student = Student(recipe.student, device=ranks.device, dtype=dtype, mesh=ranks.mesh)
        hot = HotTier.connect(redis_url) if redis_url else None
        with open_for_reading(recipe.cache, hot=hot) as cache:
            _train_from(cache, recipe, folder, stop, student, ranks)


def _train_from(
    cache: CacheReader, recipe: TrainRecipe, folder: RunFolder, stop: threading.Event, student: Student, ranks: Ranks
) -> None:
    splits = {
        split: load_split(
            recipe.tokens,
            cache,
            split,
            tokenizer=student.tokenizer.identity,
            max_prompt_tokens=recipe.max_prompt_tokens,
            temperature=recipe.temperature if split == TRAIN else 1.0,
        )
        for split in (TRAIN, HELD_OUT, HELD_OUT_TASKS)
        if split != HELD_OUT_TASKS or has_split(recipe.tokens, split)
    }
    training = splits.pop(TRAIN)
    recipe = recipe.in_steps(len(training.trajectories))
    if recipe.full_view_share > 0:
        training = training.with_full_views()
    warm_start = read_warm_start(recipe)
    # Not earlier: how a student is loaded draws random numbers, and depends on the number of ranks.
    torch.manual_seed(recipe.seed)
    adapted = assemble(recipe, student, warm_start)
    network, network_manifest = adapted.network, describe(recipe, adapted, warm_start, data=training.identity)
    attention = _attention(student, recipe, folder, training, ranks)
    with attention.in_use(student.model):
        _preflight(adapted, recipe, folder, training, ranks, attention.check)
    if recipe.shard_network and ranks.size > 1:
        shard_network(network, ranks)
    optimizer = make_optimizer(network, recipe)
    average = WeightAverage(network, recipe.ema_decay)
    evaluation = Evaluation(splits, training, seed=recipe.seed)

    store = CheckpointStore(
        folder,
        network=network,
        optimizer=optimizer,
        average=average,
        recipe=recipe,
        network_manifest=network_manifest,
        ranks=ranks,
    )
    with attention.in_use(student.model), store:
        last = store.load_last()
        # One of step 0 is of a run that did not come further than its first evaluation, with which it begins again.
        step, best = (0, BestEvaluation()) if last is None or last.step == 0 else (last.step, last.best)
        if step > 0:
            log.info("resumed", step=step)
        loggers = Loggers.of(recipe, folder) if ranks.is_first else Loggers({})
        with RunReporter(
            folder, num_steps=recipe.num_steps, first_step=step, loggers=loggers, is_first=ranks.is_first
        ) as report:
            report.state("running")
            prompts = [t.prompt_ids for t in splits[HELD_OUT].trajectories[:_STATISTICS_PROMPTS]]
            sizes = weight_norms(student.model, network.layers)
            run = _Run(
                recipe,
                folder,
                stop,
                adapted,
                optimizer,
                average,
                training,
                evaluation,
                report,
                store,
                ranks,
                prompts,
                sizes,
            )
            if step == 0:
                best = run.evaluate(step, best)
            step, best = run.steps_after(step, best)
            report.state("saving")
            store.save(step, best)
            store.wait()
            if step < recipe.num_steps and not run.is_over(best):
                report.state("stopped", f"stopped on request after step {step}; resume goes on from there")
                return
            if recipe.patience is not None:
                step = store.load_best(best).step
            with average.in_use():
                probe = make_probe(adapted, splits[HELD_OUT])
                trained = whole_network(network, recipe, student, warm_start)
                if ranks.is_first:
                    export(
                        folder.adapter if recipe.arm == "static" else folder.bundle,
                        trained,
                        recipe,
                        network_manifest=network_manifest,
                        embeddings=student.embeddings,
                        teacher=cache.identity.fingerprint,
                        step=step,
                        held_out=last_held_out_kl(folder.metrics, step),
                    )
                    write_atomically(folder.probe, probe)
            report.state("done", f"held-out KL was lowest after step {step}" if recipe.patience is not None else "")


def memory_budget(recipe: TrainRecipe, student: Student, *, tokens_per_sample: int) -> MemoryBudget:
    """The size of a step of this recipe."""
    return MemoryBudget(
        min(recipe.micro_batch_size, recipe.batch_size),
        tokens_per_sample,
        loss_workspace_bytes=recipe.loss_workspace_bytes or default_workspace_bytes(student.head.device),
        recomputes=recipe.checkpoint_activations,
        averages=recipe.ema_decay is not None,
    )


def _longest(data: DistillationData) -> int:
    return max(len(t.student_ids) for t in data.trajectories)


def _attention(
    student: Student, recipe: TrainRecipe, folder: RunFolder, data: DistillationData, ranks: Ranks
) -> Attention:
    """The same on all ranks, and after a resume the same as before."""
    earlier = earlier_choice(folder.preflight)

    def choose(name: AttentionName | None) -> Attention:
        return choose_attention(
            student.model,
            wanted=name or recipe.attention,
            device=student.head.device,
            dtype=student.head.dtype,
            num_tokens=_longest(data),
            earlier=earlier,
        )

    attention = agreed(choose, ranks)
    log.info("attention chosen", **attention.check.measured)
    return attention


def _preflight(
    adapted: AdaptedStudent,
    recipe: TrainRecipe,
    folder: RunFolder,
    data: DistillationData,
    ranks: Ranks,
    attention: Check,
) -> None:
    """Prove the parts before the first step, and leave what was measured in the run's folder."""
    budget = memory_budget(recipe, adapted.student, tokens_per_sample=_longest(data))
    report = run_preflight(adapted, partial(make_optimizer, recipe=recipe), budget, attention=attention)
    if ranks.is_first:
        write_atomically(folder.preflight, json.dumps(report.to_json(), indent=2).encode() + b"\n")
    report.require_passed()


@dataclass(frozen=True, eq=False)
class _Run:
    """Everything that the steps of a run need."""

    recipe: TrainRecipe
    folder: RunFolder
    stop: threading.Event
    adapted: AdaptedStudent
    optimizer: torch.optim.Optimizer
    average: WeightAverage
    data: DistillationData
    evaluation: Evaluation
    report: RunReporter
    store: CheckpointStore
    ranks: Ranks
    prompts: Sequence[NDArray[np.uint32]]
    """Whose adapters are compared with each other at every evaluation."""
    weight_norms: Mapping[str, float]

    def steps_after(self, first_step: int, best: BestEvaluation) -> tuple[int, BestEvaluation]:
        """Run the optimizer steps after `first_step`; returns the number of the last one done, and the best evaluation."""
        recipe, num_skipped = self.recipe, 0
        plans, batches = self._data_after(first_step)
        control = RunControl(self.folder.control, self.stop, self.ranks)
        with recomputation(self.adapted.student.model, recipe) as watch:
            for step in range(first_step + 1, recipe.num_steps + 1):
                save = partial(self._save_now, step - 1, best)
                if self.is_over(best) or not control.apply(save, self.report):
                    return step - 1, best
                for group in self.optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * learning_rate_factor(step, recipe)
                num_skipped = 0 if self._step(step, next(plans), batches, watch) else num_skipped + 1
                if num_skipped > recipe.max_skipped_steps:
                    raise DataError(
                        f"step {step} is the {num_skipped}. in a row without a finite loss and gradient; lower the learning "
                        "rate, or look at the trajectories that the log names"
                    )
                if step % recipe.evaluate_every == 0 or step == recipe.num_steps:
                    best = self.evaluate(step, best)
                if step % recipe.checkpoint_every == 0 and step < recipe.num_steps:
                    self.store.save(step, best)
        return recipe.num_steps, best

    def _save_now(self, step: int, best: BestEvaluation) -> None:
        self.store.save(step, best)
        self.store.wait()

    def is_over(self, best: BestEvaluation) -> bool:
        """Whether the held-out KL has stopped falling."""
        return self.recipe.patience is not None and best.waited >= self.recipe.patience

    def _data_after(self, first_step: int) -> tuple[Iterator[StepPlan], Iterator[Batch]]:
        recipe, lengths = self.recipe, [len(t.student_ids) for t in self.data.trajectories]
        order = batches_from(
            lengths,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            first_step=first_step,
            full_view_share=recipe.full_view_share,
        )
        model = self.adapted.student.model
        cost = StepCost.of(model.get_decoder(), model.config.get_text_config())
        costs = [cost(length) for length in lengths]
        plans, for_loader = tee(
            plan_step(step, costs, rank=self.ranks.rank, num_ranks=self.ranks.size, size=recipe.micro_batch_size)
            for step in order
        )
        return plans, self.data.batches(
            (micro.indices for plan in for_loader for micro in plan.micro_batches),
            self.adapted.student.head.device,
            workers=recipe.loader_workers,
        )

    def _step(self, step: int, plan: StepPlan, batches: Iterator[Batch], watch: RoutingWatch) -> bool:
        """One optimizer step; False if it has left the network as it was, for want of a finite loss and gradient."""
        found = accumulate_gradients(plan, batches, self.adapted, self.data, self.recipe, self.ranks)
        norms = gradient_norms(self.adapted.network)
        grad_norm = float(
            full_tensor(nn.utils.clip_grad_norm_(self.adapted.network.parameters(), self.recipe.max_grad_norm))
        )
        rerouted, rate = watch.take(), self.optimizer.param_groups[0]["lr"]
        if math.isfinite(found.loss) and math.isfinite(grad_norm):
            self.optimizer.step()
            self.average.update()
            self.report.step(
                step,
                **asdict(found),
                step_efficiency=plan.efficiency,
                grad_norm=grad_norm,
                grad_norms=norms,
                peak_memory_bytes=peak_memory_bytes(self.ranks.device),
                rerouted=rerouted,
                learning_rate=rate,
            )
            return True
        names = [self.data.trajectories[i].trajectory_id for i in plan.indices]
        log.warning("step skipped", step=step, trajectories=names, loss=found.loss, grad_norm=grad_norm)
        self.report.skipped(step, names)
        return False

    def evaluate(self, step: int, best: BestEvaluation) -> BestEvaluation:
        """Measure on the held-out splits; returns the best evaluation with this one counted."""
        with self.average.in_use():
            held_out = self.evaluation.run(self.adapted, self.ranks)
            with torch.no_grad():
                adapters = self.adapted.adapters(self.prompts)
        network = self.adapted.network
        found = adapter_statistics(adapters, network.layers, self.weight_norms, scale=network.scale)
        if found.has_collapsed and self.adapted.reads_prompt:
            log.warning("different prompts get the same adapter", step=step, cosine=found.cosine)
        self.report.evaluation(step, held_out, found)
        best = best.after(step, held_out.kl[ADAPTER])
        if best.step == step and self.recipe.patience is not None:
            self.store.save(step, best)
        return best


def make_optimizer(network: AdapterNetwork, recipe: TrainRecipe) -> torch.optim.AdamW:
    """AdamW with a learning rate of its own for what makes B, set for the first step."""
    b_parameters = network.b_parameters()
    of_b = {id(p) for p in b_parameters}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in of_b]
    b_rate = recipe.learning_rate * recipe.b_head_learning_rate_factor
    first = learning_rate_factor(1, recipe)
    return torch.optim.AdamW(
        [
            {"params": parameters, "peak_lr": rate, "lr": rate * first}
            for parameters, rate in ((rest, recipe.learning_rate), (b_parameters, b_rate))
        ],
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
    )


def learning_rate_factor(step: int, recipe: TrainRecipe) -> float:
    """Share of the peak learning rate at `step` (from 1): linear warm-up, then a cosine to a tenth."""
    if step <= recipe.warmup_steps:
        return step / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
