"""Manage the checkpoints of a run, `checkpoints/step-00000200` and so on: the latest ones and the best.

Each is written under a temporary name while training continues, and then renamed atomically; only then are older ones
removed. Whenever the process is killed, the last checkpoint with a final name is therefore complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType

import structlog
import torch
from torch import nn

from hyperagent.model.manifest import NetworkManifest
from hyperagent.storage.files import is_temporary, remove_directory
from hyperagent_trainer.checkpoint.best import BestEvaluation
from hyperagent_trainer.checkpoint.format import CheckpointManifest, load_checkpoint, snapshot, write_checkpoint
from hyperagent_trainer.config import TrainRecipe
from hyperagent_trainer.distributed import Ranks
from hyperagent_trainer.optim.ema import WeightAverage
from hyperagent_trainer.runs.folder import RunFolder

log = structlog.get_logger()


class CheckpointStore:
    """Saves and loads the training state; a context manager that waits for pending writes when it exits.

    Every rank has one, and every method must be called on all ranks.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage,
        recipe: TrainRecipe,
        network_manifest: NetworkManifest,
        ranks: Ranks,
    ) -> None:
        """Remove partial checkpoints that a killed process has left."""
        self._folder, self._network, self._optimizer, self._average = folder, network, optimizer, average
        self._recipe, self._network_manifest, self._ranks = recipe, network_manifest, ranks
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saved: tuple[int, BestEvaluation] | None = None
        """Step and best evaluation of the last checkpoint that was handed to the writer, or loaded."""
        if ranks.is_first and folder.checkpoints.is_dir():
            for path in filter(is_temporary, folder.checkpoints.iterdir()):
                shutil.rmtree(path)

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._writer.shutdown(wait=True)
        if kind is None:
            self.wait()

    def save(self, step: int, best: BestEvaluation) -> None:
        """Take a snapshot after `step` optimizer steps and write it while training continues, unless it is already saved.

        Raises:
            StorageError: writing the previous checkpoint failed; older checkpoints are kept.
        """
        if self._saved == (step, best):
            return
        self.wait()
        found = snapshot(self._network, self._optimizer, self._average, is_first=self._ranks.is_first)
        self._saved = (step, best)
        if found is None:
            return
        write = partial(
            write_checkpoint,
            self._folder.checkpoint(step),
            found,
            step=step,
            recipe=self._recipe,
            network_manifest=self._network_manifest,
            best=best,
        )
        self._writing = self._writer.submit(self._write, write, best)

    def wait(self) -> None:
        """Wait until every saved checkpoint is on the disk.

        Raises:
            StorageError: the file system reported an error.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_last(self) -> CheckpointManifest | None:
        """Load the last checkpoint and return its manifest; None if there is none.

        Raises:
            ConfigError, IdentityMismatch, CorruptRecord: see `load_checkpoint`.
        """
        steps = self._folder.saved_steps()
        if not steps:
            return None
        manifest = self._load(self._folder.checkpoint(steps[-1]))
        if self._ranks.is_first:
            _warn_of_other_threads(manifest)
        return manifest

    def load_best(self, best: BestEvaluation) -> CheckpointManifest:
        """Load the checkpoint of the best evaluation and return its manifest.

        Raises:
            ConfigError, IdentityMismatch, CorruptRecord: see `load_checkpoint`.
        """
        self.wait()
        # A barrier: only the first rank writes, and the others must wait until its files are complete.
        self._ranks.max(0)
        return self._load(self._folder.checkpoint(best.step))

    def _load(self, folder: Path) -> CheckpointManifest:
        manifest = load_checkpoint(
            folder,
            network=self._network,
            optimizer=self._optimizer,
            average=self._average,
            recipe=self._recipe,
            network_manifest=self._network_manifest,
        )
        self._saved = (manifest.step, manifest.best)
        return manifest

    def _write(self, write: Callable[[], None], best: BestEvaluation) -> None:
        write()
        kept = {*self._folder.saved_steps()[-self._recipe.keep_checkpoints :]}
        if self._recipe.patience is not None:
            kept.add(best.step)
        for step in set(self._folder.saved_steps()) - kept:
            remove_directory(self._folder.checkpoint(step))


def _warn_of_other_threads(manifest: CheckpointManifest) -> None:
    """Warn that results will not be bit-identical: sums are split over the threads, and each part is rounded."""
    before, now = manifest.num_threads, torch.get_num_threads()
    if before not in (None, now):
        log.warning(
            "resumed with another number of CPU threads: results differ in their last bits; set OMP_NUM_THREADS back",
            threads_before=before,
            threads_now=now,
        )
