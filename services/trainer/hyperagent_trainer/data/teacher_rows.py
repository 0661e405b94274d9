"""The teacher's rows as tensors: the container used from the loader to the loss.

Legend of shape suffixes: N rows, K kept ids, M recorded temperatures other than 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyperagent.errors import ConfigError


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """The teacher's distributions at N supervised positions, each over K kept ids and a tail of all others.

    A row that keeps fewer than K ids is padded at its end with its first id and a log-probability of -inf.
    """

    ids_NK: Tensor
    """int64, kept ids: distinct within a row except for padding, in the order in which the cache's codec stores them."""
    logprobs_NK: Tensor
    """Natural log-probabilities of the kept ids at `temperature`, floating point (float32 from the cache); -inf at padding."""
    tail_logmass_N: Tensor
    """Natural log of the mass of all ids that are not kept, floating point; -inf where there are none."""
    target_ids_N: Tensor | None = None
    """int64, the actual token at each position, kept or not; the cross-entropy needs it."""
    temperature: float = 1.0
    """Temperature of the rows' softmax."""
    tail_logsumexps_NM: Tensor | None = None
    """float32, the tail at each of `other_temperatures`, as `hyperagent.topk.TopKRows` defines it."""
    other_temperatures: tuple[float, ...] = ()
    """Temperatures other than 1 to which `at_temperature` can convert the rows."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self.ids_NK.shape[0])

    def __getitem__(self, rows: slice) -> TeacherRows:
        """Return consecutive rows as views, not copies."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> TeacherRows:
        """Return the rows on another device; the host does not wait for a copy from pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> TeacherRows:
        """Return the rows in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def at_temperature(self, temperature: float) -> TeacherRows:
        """Return the rows at another temperature of the softmax, each normalized together with its tail.

        At temperature 1 this only undoes the rounding of storage.

        Raises:
            ConfigError: the teacher did not record the tail at this temperature.
        """
        assert self.temperature == 1, f"the rows are at temperature {self.temperature} already"
        tail_N = self._tail_at(temperature).double()
        logits_NK = self.logprobs_NK.double() / temperature
        log_total_N = torch.logaddexp(logits_NK.logsumexp(dim=1), tail_N)
        return TeacherRows(
            self.ids_NK,
            (logits_NK - log_total_N[:, None]).float(),
            (tail_N - log_total_N).float(),
            self.target_ids_N,
            temperature,
        )

    def _tail_at(self, temperature: float) -> Tensor:
        if temperature == 1:
            return self.tail_logmass_N
        require_temperature(temperature, self.other_temperatures)
        assert self.tail_logsumexps_NM is not None
        return self.tail_logsumexps_NM[:, self.other_temperatures.index(temperature)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> TeacherRows:
        fields: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **fields)


def join_rows(parts: Sequence[TeacherRows]) -> TeacherRows:
    """Concatenate rows, such as those of a batch's trajectories, that share one temperature and have target ids."""
    return TeacherRows(
        torch.cat([part.ids_NK for part in parts]),
        torch.cat([part.logprobs_NK for part in parts]),
        torch.cat([part.tail_logmass_N for part in parts]),
        torch.cat([part.target_ids_N for part in parts if part.target_ids_N is not None]),
        parts[0].temperature,
    )


def require_temperature(temperature: float, temperatures: Sequence[float]) -> None:
    """Check that a teacher with these `temperatures` has rows at `temperature`.

    Raises:
        ConfigError: it has none; the message lists the recorded temperatures.
    """
    if temperature not in (1, *temperatures):
        there_are = ", ".join(f"{known:g}" for known in (1, *temperatures))
        raise ConfigError(
            f"the cache has rows at temperatures {there_are}, not at {temperature:g}; choose one of them, or populate "
            "another cache from a teacher served with --temperatures"
        )
