"""Summarize the measured rows: metrics of every arm with intervals, the verdict, and the breakdowns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperagent.data.chat.tokenizer import ChatTokenizer
from hyperagent.data.files.tokens_file import TokenizedTrajectory
from hyperagent_trainer.comparison.measure import ArmMetrics
from hyperagent_trainer.comparison.token_classes import CLASSES, TokenClasses, share_of_exact_calls, token_classes
from hyperagent_trainer.evaluation.arms import FROZEN, REPORT_ARMS
from hyperagent_trainer.evaluation.conditioning import ConditioningReport, conditioning_report
from hyperagent_trainer.evaluation.intervals import ratio_interval

_NUM_POSITION_BINS = 8


class Summary:
    """The measurements of one split, joined with what is known about its rows."""

    def __init__(
        self,
        measured: Mapping[str, ArmMetrics],
        trajectories: Sequence[TokenizedTrajectory],
        tokenizer: ChatTokenizer,
        dependent: Mapping[str, NDArray[np.bool_]] | None,
    ) -> None:
        """Join the measurements with the rows' classes and positions.

        Args:
            measured: metrics by arm, training seed and trajectory.
            dependent: by trajectory id, which rows of the teacher depend on the condition, shape [N]; it may lack
                trajectories. None if the teacher was not checked.
        """
        self._measured = {arm: measured[arm] for arm in REPORT_ARMS if arm in measured}
        self._trajectories = trajectories
        self._classes: list[TokenClasses] = [token_classes(t, tokenizer) for t in trajectories]
        self._rows = np.array([len(t.positions) for t in trajectories])
        self._kl = {
            arm: np.mean([np.concatenate([one.kl_N for one in seed]) for seed in seeds], axis=0)
            for arm, seeds in self._measured.items()
        }
        """Mean KL over training seeds of all trajectories' rows, by arm."""
        self._is_dependent, self._is_checked = self._dependence(dependent)

    def conditioning(self, *, margin: float, seed: int) -> ConditioningReport:
        """Compare the arms over repositories, and decide."""
        sums = {arm: np.squeeze(self._sums(arm), 0) if len(s) == 1 else self._sums(arm) for arm, s in self._items()}
        return conditioning_report(sums, self._rows, [t.repo for t in self._trajectories], margin=margin, seed=seed)

    def arms(self, *, seed: int) -> dict[str, dict[str, Any]]:
        """Return every arm's metrics as JSON values."""
        return {arm: self._arm(arm, seeds, seed) for arm, seeds in self._items()}

    def by_position(self) -> list[dict[str, Any]]:
        """Return the KL of every arm by position in the student's view, in bins of about equally many rows."""
        position = np.concatenate([t.student_positions for t in self._trajectories]).astype(np.int64)
        edges = np.unique(np.quantile(position, np.linspace(0, 1, _NUM_POSITION_BINS + 1)).astype(np.int64))
        edges[-1] += 1
        bins = [(position >= low) & (position < high) for low, high in pairwise(edges)]
        return [
            {"first": int(low), "last": int(high - 1), **self._part(chosen)}
            for low, high, chosen in zip(edges[:-1], edges[1:], bins, strict=True)
            if chosen.any()
        ]

    def by_class(self) -> list[dict[str, Any]]:
        """Return the KL of every arm by class of token."""
        class_N = np.concatenate([classes.class_N for classes in self._classes])
        return [
            {"name": name, **self._part(class_N == number)}
            for number, name in enumerate(CLASSES)
            if (class_N == number).any()
        ]

    def _items(self) -> list[tuple[str, ArmMetrics]]:
        return list(self._measured.items())

    def _sums(self, arm: str) -> NDArray[np.float64]:
        """Return the summed KL of every seed and trajectory, shape [seeds, trajectories]."""
        return np.array([[one.kl_N.sum() for one in seed] for seed in self._measured[arm]])

    def _arm(self, arm: str, seeds: ArmMetrics, seed: int) -> dict[str, Any]:
        def mean(values: list[float]) -> float:
            return float(np.mean(values))

        exact = [share_of_exact_calls([one.exact_N for one in s], self._classes) for s in seeds]
        calls = [value for value in exact if value is not None]
        low, high = self._gap_interval(arm, seed)
        frozen, own = float(self._kl[FROZEN].mean()), float(self._kl[arm].mean())
        return {
            "kl": own,
            "gap_closed": None if arm == FROZEN or not frozen else 1 - own / frozen,
            "gap_low": low,
            "gap_high": high,
            "top1_agreement": mean([float(np.concatenate([one.agrees_N for one in s]).mean()) for s in seeds]),
            "perplexity": float(np.exp(mean([float(np.concatenate([one.nll_N for one in s]).mean()) for s in seeds]))),
            "tool_calls_exact": mean(calls) if calls else None,
            "dependent_kl": self._mean_of(arm, self._is_checked & self._is_dependent),
            "other_kl": self._mean_of(arm, self._is_checked & ~self._is_dependent),
            "num_seeds": len(seeds),
        }

    def _gap_interval(self, arm: str, seed: int) -> tuple[float | None, float | None]:
        """Return the 95% interval of the share of the frozen student's KL that an arm removes."""
        repos = list(dict.fromkeys(t.repo for t in self._trajectories))
        place = np.array([repos.index(t.repo) for t in self._trajectories])
        frozen_C = np.bincount(place, weights=self._sums(FROZEN)[0]).astype(np.float64)
        if arm == FROZEN or not frozen_C.all():
            return None, None
        saved_SC = np.array([frozen_C - np.bincount(place, weights=sums) for sums in self._sums(arm)])
        found = ratio_interval(saved_SC, frozen_C, seed=seed)
        return found.low, found.high

    def _part(self, chosen: NDArray[np.bool_]) -> dict[str, Any]:
        return {"num_rows": int(chosen.sum()), "kl": {arm: float(kl[chosen].mean()) for arm, kl in self._kl.items()}}

    def _mean_of(self, arm: str, chosen: NDArray[np.bool_]) -> float | None:
        return float(self._kl[arm][chosen].mean()) if chosen.any() else None

    def _dependence(
        self, dependent: Mapping[str, NDArray[np.bool_]] | None
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which rows depend on the condition, and of which rows that is known."""
        known = [None if dependent is None else dependent.get(t.trajectory_id) for t in self._trajectories]
        filled = [np.zeros(n, bool) if k is None else k for n, k in zip(self._rows, known, strict=True)]
        checked = [np.full(n, k is not None) for n, k in zip(self._rows, known, strict=True)]
        return np.concatenate(filled), np.concatenate(checked)


def conditioning_json(report: ConditioningReport) -> dict[str, Any]:
    """Return the part of the comparison that the report shows, as JSON values."""

    def interval(found: Any) -> dict[str, Any] | None:
        return None if found is None else {name: asdict(found)[name] for name in ("mean", "low", "high")}

    return {
        "verdict": report.verdict,
        "reason": report.reason,
        "margin": report.margin,
        "num_clusters": report.num_clusters,
        "conditioning_gain": interval(report.conditioning_gain),
        "over_static": interval(report.over_static),
        "over_trained_on_shuffled": interval(report.over_trained_on_shuffled),
        "over_frozen": interval(report.over_frozen),
    }
