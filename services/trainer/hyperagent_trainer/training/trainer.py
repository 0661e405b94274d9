"""Training run from recipe to bundle; `Trainer.fit` is the training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, tee

import structlog
import torch
from torch import nn

from hyperagent.cache.hot_tier import HotTier
from hyperagent.cache.remote import open_for_reading
from hyperagent.data.files.tokens_file import HELD_OUT
from hyperagent.errors import DataError
from hyperagent.http.run_models import RunStatus
from hyperagent.storage.files import write_atomically
from hyperagent_trainer.checkpoint.best import BestEvaluation
from hyperagent_trainer.checkpoint.manager import CheckpointStore
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.data.cost import StepCost
from hyperagent_trainer.data.dataset import Batch
from hyperagent_trainer.data.schedule import StepPlan, batches_from, plan_step
from hyperagent_trainer.data.training_prompts import TrainingPrompts
from hyperagent_trainer.distributed import Ranks, full_tensor, init_distributed, peak_memory_bytes
from hyperagent_trainer.evaluation.adapter_statistics import adapter_statistics, gradient_norms, weight_norms
from hyperagent_trainer.evaluation.collapse import have_collapsed
from hyperagent_trainer.evaluation.evaluate import Evaluation
from hyperagent_trainer.export.export import export, make_probe
from hyperagent_trainer.export.statistics import statistics_of_run
from hyperagent_trainer.network.build import shard_network, whole_network
from hyperagent_trainer.optim.ema import WeightAverage
from hyperagent_trainer.optim.optimizer import make_optimizer, set_learning_rate
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.metrics_file import last_held_out_kl
from hyperagent_trainer.runs.stop_request import StopRequest
from hyperagent_trainer.student.activation_checkpoint import RoutingWatch, recomputation
from hyperagent_trainer.student.student import Student
from hyperagent_trainer.training.loggers import Loggers, require_installed
from hyperagent_trainer.training.reporter import RunReporter
from hyperagent_trainer.training.run_control import RunControl
from hyperagent_trainer.training.setup import TrainingSetup, load_setup, require_preflight
from hyperagent_trainer.training.step import accumulate_gradients

log = structlog.get_logger()

_STATISTICS_PROMPTS = 8


def train(recipe: TrainRecipe, folder: RunFolder, stop: StopRequest, *, redis_url: str | None = None) -> None:
    """Train until the recipe's last step, or save and return early once `stop` is set on any rank.

    Training resumes from the folder's last checkpoint if there is one. Under torchrun, every process makes this call.

    Args:
        redis_url: URL of the cache's hot tier, if there is one.

    Raises:
        HyperagentError: the recipe's inputs are missing, damaged, or do not match.
    """
    with init_distributed() as ranks:
        if ranks.is_first:
            folder.write_status(RunStatus(state="loading", num_steps=recipe.num_steps))
        require_installed(recipe.loggers)
        if _stopped_while_loading(recipe, folder, stop, ranks):
            return
        dtype = getattr(torch, recipe.student_dtype)
        student = Student(recipe.student, device=ranks.device, dtype=dtype, mesh=ranks.mesh)
        if _stopped_while_loading(recipe, folder, stop, ranks):
            return
        hot = HotTier.connect(redis_url) if redis_url else None
        with open_for_reading(recipe.cache, hot=hot) as cache:
            setup = load_setup(recipe, folder, cache, student, ranks)
            with setup.attention.in_use(student.model):
                require_preflight(setup, folder, ranks)
                if _stopped_while_loading(recipe, folder, stop, ranks):
                    return
                trainer = Trainer(setup, folder, stop, ranks)
                with trainer.checkpoints, trainer.reporter:
                    trainer.fit()
                    trainer.finish()


def _stopped_while_loading(recipe: TrainRecipe, folder: RunFolder, stop: StopRequest, ranks: Ranks) -> bool:
    """Return whether `stop` is set on any rank, and if so end the run as "stopped"; a collective call."""
    if not ranks.max(stop.is_set()):
        return False
    if ranks.is_first:
        step = max(folder.saved_steps(), default=0)
        remedy = (
            f"resume continues from step {step}" if folder.saved_steps() else "there is no checkpoint; start a new run"
        )
        reason = f"stopped on request while loading; {remedy}"
        folder.write_status(RunStatus(state="stopped", reason=reason, step=step, num_steps=recipe.num_steps))
    return True


class Trainer:
    """Trainer of one run, instantiated on every rank; every public method is a collective call.

    Attributes:
        step: number of completed optimizer steps.
        best: best evaluation so far.
        checkpoints, reporter: context managers that the caller must enter.
    """

    def __init__(self, setup: TrainingSetup, folder: RunFolder, stop: StopRequest, ranks: Ranks) -> None:
        """Resume from the folder's last checkpoint if there is one, and remove the metrics of later steps.

        Raises:
            ConfigError, IdentityMismatch, CorruptRecord: the checkpoint belongs to another run or is damaged.
        """
        recipe, network = setup.recipe, setup.adapted.network
        self._setup, self._recipe, self._folder, self._ranks = setup, recipe, folder, ranks
        self._adapted = setup.adapted
        if recipe.shard_network and ranks.size > 1:
            shard_network(network, ranks)
        self._optimizer = make_optimizer(network, recipe)
        self._average = WeightAverage(network, recipe.ema_decay)
        self._evaluation = Evaluation(setup.held_out, setup.training, seed=recipe.seed)
        # The adapters of these prompts are compared with each other at every evaluation.
        self._statistics_prompts = [t.prompt_ids for t in setup.held_out[HELD_OUT].trajectories[:_STATISTICS_PROMPTS]]
        self._prompts = TrainingPrompts(
            setup.training.trajectories, shuffled=recipe.prompts == "shuffled", seed=recipe.seed
        )
        self._weight_norms = weight_norms(setup.adapted.student.model, network.layers)
        self._num_skipped = 0
        self._control = RunControl(folder.control, stop, ranks)
        self.checkpoints = CheckpointStore(
            folder,
            network=network,
            optimizer=self._optimizer,
            average=self._average,
            recipe=recipe,
            network_manifest=setup.network_manifest,
            ranks=ranks,
        )
        self.step, self.best = self._resume()
        self.reporter = RunReporter(
            folder,
            num_steps=recipe.num_steps,
            first_step=self.step,
            loggers=Loggers.of(recipe, folder) if ranks.is_first else Loggers({}),
            is_first=ranks.is_first,
        )

    def fit(self) -> None:
        """Train until the last step, until the held-out KL has stopped falling, or until a stop is requested.

        Raises:
            DataError: too many steps in a row had no finite loss and gradient.
        """
        recipe = self._recipe
        self.reporter.state("running")
        if self.step == 0:
            self.evaluate()
        plans, batches = self._data_after(self.step)
        with recomputation(self._adapted.student.model, recipe) as watch:
            while not self._is_over and self._control.apply(self._save, self.reporter):
                self.step += 1
                set_learning_rate(self._optimizer, self.step, recipe)
                self.train_step(next(plans), batches, watch)
                if self.step % recipe.evaluate_every == 0 or self.step == recipe.num_steps:
                    self.evaluate()
                if self.step % recipe.checkpoint_every == 0 and self.step < recipe.num_steps:
                    self.checkpoints.save(self.step, self.best)

    def train_step(self, plan: StepPlan, batches: Iterator[Batch], watch: RoutingWatch) -> None:
        """Run one optimizer step; without a finite loss and gradient, leave the network as it is.

        Raises:
            DataError: too many consecutive steps had no finite loss and gradient, or the teacher's rows are invalid.
            CorruptRecord: the cache's record of a trajectory is damaged.
        """
        network = self._adapted.network
        result = accumulate_gradients(
            plan,
            batches,
            self._adapted,
            self._setup.training,
            self._prompts,
            self._recipe,
            self._ranks,
            step=self.step,
        )
        norms = gradient_norms(network)
        grad_norm = float(full_tensor(nn.utils.clip_grad_norm_(network.parameters(), self._recipe.max_grad_norm)))
        rerouted = watch.take()
        if not (math.isfinite(result.loss) and math.isfinite(grad_norm)):
            self._skip_step(plan, result.loss, grad_norm)
            return
        self._num_skipped = 0
        self._optimizer.step()
        self._average.update()
        self.reporter.step(
            self.step,
            **asdict(result),
            step_efficiency=plan.efficiency,
            grad_norm=grad_norm,
            grad_norms=norms,
            peak_memory_bytes=peak_memory_bytes(self._ranks.device),
            rerouted=rerouted,
            learning_rate=self._optimizer.param_groups[0]["lr"],
        )

    def evaluate(self) -> None:
        """Measure every arm's held-out KL and the adapters' statistics; keep the network if it is the best so far."""
        with self._average.in_use():
            held_out = self._evaluation.run(self._adapted, self._ranks)
            with torch.no_grad():
                adapters = self._adapted.adapters(self._statistics_prompts)
        network = self._adapted.network
        statistics = adapter_statistics(adapters, network.layers, self._weight_norms, scale=network.scale)
        collapsed = have_collapsed(statistics.cosine, held_out.conditioning.get(HELD_OUT))
        if collapsed:
            log.warning("different prompts get the same adapter", step=self.step, cosine=statistics.cosine)
        self.reporter.evaluation(self.step, held_out, statistics, collapsed=collapsed)
        self.best = self.best.after(self.step, held_out.selecting_kl)
        if self.best.step == self.step and self._recipe.patience is not None:
            self.checkpoints.save(self.step, self.best)

    def finish(self) -> None:
        """Save a checkpoint, and export the network unless the run was stopped early."""
        self.reporter.state("saving")
        self._save()
        if not self._is_over:
            reason = f"stopped on request after step {self.step}; resume continues from there"
            self.reporter.state("stopped", reason)
            return
        if self._recipe.patience is None:
            self._export(self.step)
            self.reporter.state("done")
        else:
            step = self.checkpoints.load_best(self.best).step
            self._export(step)
            self.reporter.state("done", f"held-out KL was lowest after step {step}")

    @property
    def _is_over(self) -> bool:
        """Whether the last step is done, or the held-out KL has stopped falling."""
        patience = self._recipe.patience
        return self.step >= self._recipe.num_steps or (patience is not None and self.best.waited >= patience)

    def _resume(self) -> tuple[int, BestEvaluation]:
        """Load the last checkpoint; return its step and best evaluation."""
        last = self.checkpoints.load_last()
        # A checkpoint at step 0 belongs to a run that was stopped after its first evaluation, which is repeated.
        if last is None or last.step == 0:
            return 0, BestEvaluation()
        log.info("resumed", step=last.step)
        return last.step, last.best

    def _save(self) -> None:
        self.checkpoints.save(self.step, self.best)
        self.checkpoints.wait()

    def _data_after(self, first_step: int) -> tuple[Iterator[StepPlan], Iterator[Batch]]:
        """Return this rank's plans of the steps after `first_step`, and their batches, which are prefetched."""
        recipe, training = self._recipe, self._setup.training
        lengths = [len(t.student_ids) for t in training.trajectories]
        order = batches_from(
            lengths,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            first_step=first_step,
            full_view_share=recipe.full_view_share,
        )
        model = self._adapted.student.model
        cost = StepCost.of(model.get_decoder(), model.config.get_text_config())
        costs = [cost(length) for length in lengths]
        plans, for_loader = tee(
            plan_step(step, costs, rank=self._ranks.rank, num_ranks=self._ranks.size, size=recipe.micro_batch_size)
            for step in order
        )
        return plans, training.batches(
            (micro.indices for plan in for_loader for micro in plan.micro_batches),
            self._adapted.student.head.device,
            workers=recipe.loader_workers,
        )

    def _skip_step(self, plan: StepPlan, loss: float, grad_norm: float) -> None:
        names = [self._setup.training.trajectories[i].trajectory_id for i in plan.indices]
        log.warning("step skipped", step=self.step, trajectories=names, loss=loss, grad_norm=grad_norm)
        self.reporter.skipped(self.step, names)
        self._num_skipped += 1
        if self._num_skipped > self._recipe.max_skipped_steps:
            raise DataError(
                f"step {self.step} is the {self._num_skipped}. in a row without a finite loss and gradient; lower the "
                "learning rate, or inspect the trajectories listed in the log"
            )

    def _export(self, step: int) -> None:
        """Write the bundle or the static adapter of the network after `step`, and a probe for verifying it."""
        setup, recipe, folder, student = self._setup, self._recipe, self._folder, self._adapted.student
        with self._average.in_use():
            probe = make_probe(self._adapted, setup.held_out[HELD_OUT])
            trained = whole_network(self._adapted.network, recipe, student, setup.warm_start)
            # On every rank, because a hypernetwork that reads hidden states runs layers of the sharded student.
            statistics = statistics_of_run(
                trained,
                student.model,
                chain(setup.training.trajectories, setup.held_out[HELD_OUT].trajectories),
                seed=recipe.seed,
            )
            if not self._ranks.is_first:
                return
            export(
                folder.adapter if recipe.arm == "static" else folder.bundle,
                trained,
                recipe,
                network_manifest=setup.network_manifest,
                embeddings=student.embeddings,
                teacher=setup.teacher,
                step=step,
                held_out=last_held_out_kl(folder.metrics, step),
                statistics=statistics,
            )
            write_atomically(folder.probe, probe)
