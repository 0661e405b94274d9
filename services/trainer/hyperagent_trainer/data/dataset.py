"""Join trajectories with the teacher's rows into batches.

Legend of shape suffixes: B trajectories, T tokens, P prompt tokens, N supervised rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from hyperagent.cache.base import CacheReader
from hyperagent.cache.hot_tier import HotTierStats
from hyperagent.data.files.tokens_file import TokenizedTrajectory, read_data_identity, read_tokens
from hyperagent.errors import DataError, HyperagentError, LimitExceeded, ServiceError
from hyperagent.identity import DataIdentity, TokenizerIdentity, require_same
from hyperagent_trainer.data.row_loader import load_rows
from hyperagent_trainer.data.teacher_rows import TeacherRows, join_rows, require_temperature

# Batches that each worker process prepares ahead: enough to cover one that takes longer than the others.
_BATCHES_AHEAD = 2
# Seconds without a batch after which the worker processes count as hung: far longer than a read from a slow file system.
_SILENT_S = 600.0


@dataclass(frozen=True, eq=False)
class Batch:
    """Trajectories that are computed together; padding is on the right."""

    indices: tuple[int, ...]
    """Indices of the trajectories in the split."""
    token_ids_BT: Tensor
    """int64, token ids of the student's view."""
    num_tokens: int
    """Real tokens, padding not counted."""
    sample_N: Tensor
    """int64, index within the batch of the trajectory that each supervised row belongs to."""
    index_N: Tensor
    """int64, index of the student's output for each row: one before the row's position in the student's view."""
    rows: TeacherRows
    """The teacher's rows with their target ids, normalized at the temperature of the loss."""
    hot_tier_stats: HotTierStats
    """Hits and misses of the cache's hot tier while the batch was read."""

    @property
    def num_rows(self) -> int:
        """Number of supervised rows."""
        return self.rows.num_rows

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device; the host does not wait for a copy from pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True), self.rows.to(device))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; torch's `DataLoader` calls the method by this name."""
        return self._each(Tensor.pin_memory, self.rows.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor], rows: TeacherRows) -> Batch:
        return replace(
            self,
            token_ids_BT=change(self.token_ids_BT),
            sample_N=change(self.sample_N),
            index_N=change(self.index_N),
            rows=rows,
        )


@dataclass(frozen=True, eq=False)
class _Sample:
    """The data needed to read one trajectory of a batch."""

    index: int
    """Index of the trajectory in the split."""
    key: str
    """Key of the trajectory in the cache."""
    student_ids: NDArray[np.uint32]
    """Token ids of the student's view."""
    student_positions: NDArray[np.uint32]
    """Supervised positions in the student's view."""


class BatchReader(Dataset[Batch]):
    """Reads batches from the cache.

    Each worker process gets a copy with the cache and the temperature. The token ids arrive with each request, so a
    worker never holds more of the split than the batches it is preparing.
    """

    def __init__(self, cache: CacheReader, *, temperature: float) -> None:
        self.cache = cache
        self.temperature = temperature

    def __getitem__(self, samples: Sequence[_Sample]) -> Batch:
        """Return the trajectories joined into one batch on the host.

        Raises:
            CorruptRecord: a record is damaged.
        """
        before = self.cache.hot_tier_stats
        rows = [self._rows(sample) for sample in samples]
        # Row n of the teacher belongs to the nth supervised position of the student's own view.
        position_N = torch.from_numpy(np.concatenate([s.student_positions for s in samples]).astype(np.int64))
        return Batch(
            indices=tuple(sample.index for sample in samples),
            token_ids_BT=_pad([sample.student_ids for sample in samples]),
            num_tokens=sum(len(sample.student_ids) for sample in samples),
            sample_N=torch.from_numpy(np.repeat(np.arange(len(rows)), [r.num_rows for r in rows])),
            index_N=position_N - 1,
            rows=join_rows(rows),
            hot_tier_stats=self.cache.hot_tier_stats.since(before),
        )

    def _rows(self, sample: _Sample) -> TeacherRows:
        rows = load_rows(self.cache, sample.key).at_temperature(self.temperature)
        target_ids_N = sample.student_ids[sample.student_positions].astype(np.int64)
        return replace(rows, target_ids_N=torch.from_numpy(target_ids_N))


class DistillationData:
    """One split of a tokens file, with the cached teacher's rows of every trajectory."""

    def __init__(
        self,
        trajectories: Sequence[TokenizedTrajectory],
        keys: Sequence[str],
        identity: DataIdentity,
        reader: BatchReader,
    ) -> None:
        """Join trajectories with their `keys` in the reader's cache."""
        self.identity = identity
        self.trajectories = tuple(trajectories)
        self.reader = reader
        self._keys = tuple(keys)

    def with_full_views(self) -> DistillationData:
        """Return the split with every trajectory appended once more as the teacher sees it, with nothing hidden.

        Of n trajectories, the full view of trajectory i has index n + i.
        """
        full = [replace(t, student_ids=t.token_ids, student_positions=t.positions) for t in self.trajectories]
        return DistillationData([*self.trajectories, *full], self._keys * 2, self.identity, self.reader)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """Return the trajectories at `indices` joined into one batch on the host.

        Raises:
            CorruptRecord: a record is damaged.
        """
        return self.reader[self._samples(indices)]

    def batches(self, order: Iterable[Sequence[int]], device: torch.device, *, workers: int) -> Iterator[Batch]:
        """Yield the batches of `order`, in that order for any number of workers.

        Args:
            workers: number of processes that read and decode ahead; each holds a few batches at a time. With 0, this
                process reads each batch when it is requested.

        Raises:
            CorruptRecord: a record is damaged.
            ServiceError: a worker process died, or none delivered a batch for ten minutes.
        """
        loader = DataLoader(
            self.reader,
            batch_size=None,
            sampler=map(self._samples, order),
            num_workers=workers,
            prefetch_factor=_BATCHES_AHEAD if workers else None,
            # A fork would share the cache's connections, and locks that other threads hold.
            multiprocessing_context="spawn" if workers else None,
            # Torch waits for ever by default, such as for a batch that a full /dev/shm did not take.
            timeout=_SILENT_S if workers else 0,
            pin_memory=device.type == "cuda",
            # A separate generator, so that training draws the same random numbers with any number of workers.
            generator=torch.Generator(),
        )
        for batch in or_reason(iter(loader)):
            yield batch.to(device)

    def _samples(self, indices: Sequence[int]) -> list[_Sample]:
        chosen = [(i, self.trajectories[i]) for i in indices]
        return [_Sample(i, self._keys[i], t.student_ids, t.student_positions) for i, t in chosen]


def or_reason(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the loader's batches; the end of a worker process becomes an error that says what to look at."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except HyperagentError:
            raise
        except RuntimeError as error:
            # Torch has no class of its own for these.
            if not str(error).startswith("DataLoader"):
                raise
            raise ServiceError(
                f"the processes that read batches ahead have failed: {' '.join(str(error).split())}; look whether memory or "
                "/dev/shm is full or the cache's file system hangs, or set the recipe's loader_workers to 0, and resume the run"
            ) from error
        yield batch


def load_split(
    tokens: Path,
    cache: CacheReader,
    split: str,
    *,
    tokenizer: TokenizerIdentity,
    max_prompt_tokens: int,
    temperature: float = 1.0,
) -> DistillationData:
    """Read one split and check that all of it can be trained on.

    Raises:
        IdentityMismatch: the tokens, the cache and the student do not share one `tokenizer`, or the cache was populated
            from other data.
        DataError: the split is empty, or the cache lacks trajectories of it.
        LimitExceeded: a prompt is longer than the hypernetwork reads.
        ConfigError: the cache has no rows at the temperature.
    """
    data = read_data_identity(tokens)
    require_same(
        f"the tokenizer of {tokens}",
        expected=tokenizer,
        found=data.tokenizer,
        remedy="tokenize the data with the student's tokenizer",
    )
    teacher = cache.identity
    require_same(
        "the tokenizer of the cache's teacher",
        expected=tokenizer,
        found=TokenizerIdentity(teacher.tokenizer_sha256, teacher.template_sha256),
        remedy="the student and the teacher must share one tokenizer",
    )
    cache.require_data(data)
    require_temperature(temperature, teacher.temperatures)
    trajectories = list(read_tokens(tokens, split=split))
    if not trajectories:
        raise DataError(f"{tokens} has no trajectory in the {split} split")
    # A key hashes the whole trajectory, so it is computed once.
    keys = [cache.key(t.token_ids, t.positions) for t in trajectories]
    missing = [t.trajectory_id for t, key in zip(trajectories, keys, strict=True) if not cache.contains(key)]
    if missing:
        raise DataError(
            f"the cache lacks {len(missing)} of {len(trajectories)} {split} trajectories, the first is "
            f"{missing[0]!r}; run `hyperagent cache populate {tokens}` again"
        )
    if (longest := max(len(t.prompt_ids) for t in trajectories)) > max_prompt_tokens:
        raise LimitExceeded(
            f"a prompt has {longest} tokens, but the recipe's max_prompt_tokens is {max_prompt_tokens}; raise it"
        )
    return DistillationData(trajectories, keys, data, BatchReader(cache, temperature=temperature))


def pad_prompts(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the prompts' ids [B, P] (int64), padded on the right, and their mask [B, P], True at real tokens."""
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = _pad(prompts).to(device)
    return ids, torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]


def _pad(sequences: Sequence[np.ndarray]) -> Tensor:
    return pad_sequence([torch.from_numpy(s.astype(np.int64)) for s in sequences], batch_first=True)
