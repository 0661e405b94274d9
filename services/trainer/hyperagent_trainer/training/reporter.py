"""Reporting of a training run to `metrics.jsonl` and `status.json`."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hyperagent.http.run_models import RunState, RunStatus
from hyperagent_trainer.evaluation.adapter_statistics import AdapterStatistics
from hyperagent_trainer.evaluation.evaluate import HeldOut
from hyperagent_trainer.runs.folder import RunFolder
from hyperagent_trainer.runs.metrics_file import truncate_after
from hyperagent_trainer.training.loggers import Loggers

# Window in steps for speed and ETA: long enough to be stable, short enough to follow changes.
_WINDOW_STEPS = 20
# Writing a status needs an fsync, which would dominate the time of a fast tiny run.
_STATUS_INTERVAL_S = 0.5


class RunReporter:
    """Write a run's metrics and status; a context manager."""

    def __init__(
        self, folder: RunFolder, *, num_steps: int, first_step: int, loggers: Loggers, is_first: bool = True
    ) -> None:
        """Open the run's files and remove the metrics of steps after `first_step`, which will be repeated.

        Args:
            loggers: receive every line of the metrics and are closed at the end.
            is_first: whether this is the rank that writes; other ranks write nothing and must pass empty `loggers`.
        """
        self._folder = folder
        self._is_first = is_first
        self._loggers = loggers
        self._status = RunStatus(state="loading", step=first_step, num_steps=num_steps)
        self._recent: deque[tuple[float, int]] = deque(maxlen=_WINDOW_STEPS + 1)
        self._written_at = 0.0
        self._skipped = 0
        if is_first:
            truncate_after(folder.metrics, first_step)
        self._metrics: IO[str] = (folder.metrics if is_first else Path(os.devnull)).open("a", encoding="utf-8")
        self._restart_clock()

    def __enter__(self) -> RunReporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._loggers.close()

    def state(self, state: RunState, reason: str = "") -> None:
        """Change the run's state; time spent in other states does not count as training."""
        self._restart_clock()
        self._update(state=state, reason=reason, eta_s=None, force=True)

    def step(self, step: int, *, loss: float, num_tokens: int, **values: Any) -> None:
        """Report one optimizer step; `num_tokens` includes context."""
        self._recent.append((time.monotonic(), num_tokens))
        seconds = self._recent[-1][0] - self._recent[0][0]
        steps = len(self._recent) - 1
        tokens_per_s = sum(tokens for _, tokens in list(self._recent)[1:]) / seconds
        eta_s = (self._status.num_steps - step) * seconds / steps
        self._line(step=step, loss=loss, tokens_per_s=tokens_per_s, **values)
        self._update(step=step, loss=loss, tokens_per_s=tokens_per_s, eta_s=eta_s)

    def skipped(self, step: int, trajectory_ids: Sequence[str]) -> None:
        """Report a step that left the network unchanged."""
        self._skipped += 1
        self._line(step=step, skipped=list(trajectory_ids))
        self._update(step=step, skipped_steps=self._skipped)

    def evaluation(self, step: int, held_out: HeldOut, adapters: AdapterStatistics, *, collapsed: bool) -> None:
        """Report an evaluation; its time does not count as training."""
        conditioning = {
            split: {"gain": report.to_json()["conditioning_gain"], "verdict": report.verdict}
            for split, report in held_out.conditioning.items()
        }
        self._line(
            step=step,
            held_out_kl=held_out.kl,
            conditioning=conditioning,
            adapter_relative_norm=adapters.relative_norm,
            adapter_cosine=adapters.cosine,
        )
        self._restart_clock()
        gains = {split: report.reason for split, report in held_out.conditioning.items()}
        self._update(held_out_kl=held_out.kl, conditioning=gains, adapters_collapsed=collapsed, force=True)

    def _restart_clock(self) -> None:
        self._recent.clear()
        self._recent.append((time.monotonic(), 0))

    def _line(self, **values: Any) -> None:
        self._metrics.write(json.dumps(_finite(values), allow_nan=False) + "\n")
        self._metrics.flush()
        self._loggers.log(values)

    def _update(self, *, force: bool = False, **changes: Any) -> None:
        self._status = self._status.model_copy(update={**changes, "updated_at": time.time()})
        if self._is_first and (force or time.monotonic() - self._written_at >= _STATUS_INTERVAL_S):
            self._folder.write_status(self._status)
            self._written_at = time.monotonic()


def _finite(value: Any) -> Any:
    """Replace every number in `value` that is not finite with None, because JSON cannot represent them."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
