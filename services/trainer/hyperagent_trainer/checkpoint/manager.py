"""The checkpoints of a run: `checkpoints/step-00000200` and so on, the last few and the best.

Each is written under a temporary name while training continues, and gets its name in one rename; only then are older
ones removed. So whenever the process is killed, the last checkpoint that has a name is whole.
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
    """Saves and loads what is trained; a context manager, which waits for what is still being written.

    On every rank there is one, and each of its methods has to be called on all of them.
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
        """Remove what a killed process has left of a checkpoint."""
        self._folder, self._network, self._optimizer, self._average = folder, network, optimizer, average
        self._recipe, self._belongs_to, self._ranks = recipe, network_manifest, ranks
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saved: tuple[int, BestEvaluation] | None = None
        """The last that was handed to the writer, or loaded."""
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
        """Take a snapshot after `step` optimizer steps, and write it while training continues; skip one that is saved.

        Raises:
            StorageError: the file system refused the previous one; older checkpoints are kept.
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
            network_manifest=self._belongs_to,
            best=best,
        )
        self._writing = self._writer.submit(self._write, write, best)

    def wait(self) -> None:
        """Until all that was saved is on the disk.

        Raises:
            StorageError: the file system refused.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_last(self) -> CheckpointManifest | None:
        """Go back to the last checkpoint, if there is one.

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
        """Go back to the checkpoint of the best evaluation.

        Raises:
            ConfigError, IdentityMismatch, CorruptRecord: see `load_checkpoint`.
        """
        self.wait()
        # The other ranks have nothing to wait for but the first.
        self._ranks.max(0)
        return self._load(self._folder.checkpoint(best.step))

    def _load(self, folder: Path) -> CheckpointManifest:
        manifest = load_checkpoint(
            folder,
            network=self._network,
            optimizer=self._optimizer,
            average=self._average,
            recipe=self._recipe,
            network_manifest=self._belongs_to,
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
    """Say that the run will not be the same bit by bit: sums are split over the threads, and rounded by part."""
    before, now = manifest.num_threads, torch.get_num_threads()
    if before not in (None, now):
        log.warning(
            "resumed with another number of CPU threads: results differ in their last bits; set OMP_NUM_THREADS as before",
            threads_before=before,
            threads_now=now,
        )
