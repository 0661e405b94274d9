"""Trajectories joined with the teacher's rows, and the order in which training sees them.

Legend of shape suffixes: B trajectories, T tokens, P prompt tokens, N supervised rows of the batch, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from hyperagent.cache.base import CacheReader
from hyperagent.cache.hot_tier import HotTierStats
from hyperagent.data.files.tokens_file import TokenizedTrajectory, read_data_identity, read_tokens
from hyperagent.errors import DataError, LimitExceeded
from hyperagent.identity import DataIdentity, TokenizerIdentity, require_same
from hyperagent.loader.rows import RowTensors, load_rows, require_temperature

# Batches that each worker process has ready or in work: enough to cover one that takes longer than the others.
_BATCHES_AHEAD = 2


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step computes on; padding stands on the right."""

    indices: tuple[int, ...]
    """Its trajectories, in their split."""
    token_ids_BT: Tensor
    """int64, the student's view."""
    num_tokens: int
    """Real tokens, padding not counted."""
    sample_N: Tensor
    """int64, which trajectory a supervised row belongs to."""
    index_N: Tensor
    """int64, where the student's output for the row stands: one before the row's position in the student's view."""
    target_ids_N: Tensor
    """int64, the token that really stands at the row's position."""
    ids_NK: Tensor
    """int64, the teacher's kept ids."""
    logprobs_NK: Tensor
    """float32, at the temperature, normalized together with the tail."""
    tail_logmass_N: Tensor
    """float32."""
    temperature: float
    """Of the softmax that the teacher's rows are under, and the student's belong under."""
    hot_tier_stats: HotTierStats
    """What the cache's hot tier did for it."""

    @property
    def num_rows(self) -> int:
        return int(self.sample_N.shape[0])

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; from pinned memory the host does not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the loader calls it by this name."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        fields: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **fields)


class DistillationData(Dataset[Batch]):
    """One split of a tokens file, every trajectory of it with its rows in the teacher's cache."""

    def __init__(
        self,
        trajectories: Sequence[TokenizedTrajectory],
        cache: CacheReader,
        identity: DataIdentity,
        *,
        temperature: float = 1.0,
    ) -> None:
        self.identity = identity
        self.temperature = temperature
        self.trajectories = tuple(trajectories)
        self._cache = cache

    def with_full_views(self) -> DistillationData:
        """With every trajectory a second time, n further on for n of them, as the teacher sees it: nothing hidden."""
        full = [replace(t, student_ids=t.token_ids, student_positions=t.positions) for t in self.trajectories]
        return DistillationData([*self.trajectories, *full], self._cache, self.identity, temperature=self.temperature)

    def rows(self, index: int) -> RowTensors:
        """The teacher's rows of one trajectory at the temperature, normalized.

        Raises:
            CorruptRecord: the record is damaged.
        """
        trajectory = self.trajectories[index]
        rows = load_rows(self._cache, self._cache.key(trajectory.token_ids, trajectory.positions))
        return rows.at_temperature(self.temperature)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """The trajectories at `indices`, joined into one batch on the host."""
        before = self._cache.hot_tier_stats
        chosen = [self.trajectories[i] for i in indices]
        rows = [self.rows(i) for i in indices]
        sample_N = torch.from_numpy(np.repeat(np.arange(len(rows)), [r.num_rows for r in rows]))
        # Row n of the teacher belongs to the nth supervised position of the student's own view.
        position_N = torch.from_numpy(np.concatenate([t.student_positions for t in chosen]).astype(np.int64))
        token_ids_BT = _pad([t.student_ids for t in chosen])
        return Batch(
            indices=tuple(indices),
            token_ids_BT=token_ids_BT,
            num_tokens=sum(len(t.student_ids) for t in chosen),
            sample_N=sample_N,
            index_N=position_N - 1,
            target_ids_N=token_ids_BT[sample_N, position_N],
            ids_NK=torch.cat([r.ids_NK for r in rows]).long(),
            logprobs_NK=torch.cat([r.logprobs_NK for r in rows]),
            tail_logmass_N=torch.cat([r.tail_logmass_N for r in rows]),
            temperature=self.temperature,
            hot_tier_stats=self._cache.hot_tier_stats.since(before),
        )

    def batches(self, order: Iterable[Sequence[int]], device: torch.device, *, workers: int) -> Iterator[Batch]:
        """The batches of `order`, in that order whatever the number of `workers`, which read and decode ahead of it.

        Args:
            workers: processes; each holds a few batches at a time. 0 reads a batch when it is asked for.
        """
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            prefetch_factor=_BATCHES_AHEAD if workers else None,
            # A fork would share the cache's connections, and locks that other threads hold.
            multiprocessing_context="spawn" if workers else None,
            pin_memory=device.type == "cuda",
            # One of its own, so that training draws the same numbers with any number of workers.
            generator=torch.Generator(),
        )
        for batch in loader:
            yield batch.to(device)


def load_split(
    tokens: Path,
    cache: CacheReader,
    split: str,
    *,
    tokenizer: TokenizerIdentity,
    max_prompt_tokens: int,
    temperature: float = 1.0,
) -> DistillationData:
    """Read one split and check that it can be trained on as a whole.

    Raises:
        IdentityMismatch: the tokens, the cache and the student's `tokenizer` are not of one kind, or the cache was
            populated from other data.
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
    missing = [t.trajectory_id for t in trajectories if not cache.contains(cache.key(t.token_ids, t.positions))]
    if missing:
        raise DataError(
            f"the cache lacks {len(missing)} of {len(trajectories)} {split} trajectories, the first is "
            f"{missing[0]!r}; run `hyperagent cache populate {tokens}` again"
        )
    if (longest := max(len(t.prompt_ids) for t in trajectories)) > max_prompt_tokens:
        raise LimitExceeded(f"a prompt has {longest} tokens, the recipe's max_prompt_tokens is {max_prompt_tokens}")
    return DistillationData(trajectories, cache, data, temperature=temperature)


def pad_prompts(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompt ids [B, P] (int64) and their mask [B, P], True at real tokens."""
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = _pad(prompts).to(device)
    return ids, torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]


def _pad(sequences: Sequence[np.ndarray]) -> Tensor:
    return pad_sequence([torch.from_numpy(s.astype(np.int64)) for s in sequences], batch_first=True)
