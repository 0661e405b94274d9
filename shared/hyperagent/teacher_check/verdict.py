"""Summarize compared rows: whether the teacher's rows depend on the condition enough to distill it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperagent.errors import DataError
from hyperagent.teacher_check.compare import ComparedTrajectory

DEPENDENT_NATS = 0.1
"""Default KL above which a row counts as dependent on the condition."""
LEAST_DEPENDENT_SHARE = 0.01
"""Default share of dependent rows below which there is nothing to distill (docs/teacher-check.md)."""


@dataclass(frozen=True)
class DependenceFigures:
    """How much a set of rows depends on the condition; means over rows, in nats."""

    num_rows: int
    kl: float
    """Mean of KL(own || foreign), a lower bound."""
    dependent_share: float
    """Share of rows whose KL is above the threshold."""
    own_nll: float
    """Mean negative log-probability of the recorded tokens under their own condition."""
    foreign_nll: float
    """The same under the condition of another repository."""


@dataclass(frozen=True)
class TeacherCheck:
    """Result of the teacher check."""

    all_rows: DependenceFigures
    repositories: Mapping[str, DependenceFigures]
    """Figures of each repository, ordered by name."""
    num_trajectories: int
    num_unchanged: int
    """Number of trajectories whose foreign condition is the same as their own; their KL is 0."""
    threshold: float
    """KL in nats above which a row is dependent."""
    least_dependent_share: float

    @property
    def nothing_to_distill(self) -> bool:
        """Whether fewer rows depend on the condition than `least_dependent_share`."""
        return self.all_rows.dependent_share < self.least_dependent_share

    @property
    def verdict(self) -> str:
        """One sentence with the result, its reason in figures, and what to change if there is nothing to distill."""
        rows = self.all_rows
        share = f"{rows.dependent_share:.1%} of the rows depend on the condition (KL above {self.threshold:g} nats)"
        if self.nothing_to_distill:
            return (
                f"nothing to distill here: only {share}, less than {self.least_dependent_share:.1%}; choose a condition "
                "that says more about the repository (--condition, --extra) or hide more of it from the student "
                "(--internalize), or use a teacher that follows its condition"
            )
        if rows.foreign_nll <= rows.own_nll:
            return (
                f"the teacher's rows change with the condition but do not improve: {share}, yet the recorded tokens "
                f"cost {rows.own_nll:.3f} nats under their own condition and {rows.foreign_nll:.3f} under a foreign "
                "one; expect little from conditioning"
            )
        return (
            f"the teacher uses the condition: {share}, and the recorded tokens cost {rows.own_nll:.3f} nats under "
            f"their own condition and {rows.foreign_nll:.3f} under a foreign one"
        )

    def to_json(self) -> dict[str, Any]:
        """Return all figures and the verdict as JSON values, the figures of all rows at the top level."""
        return {
            "verdict": self.verdict,
            "nothing_to_distill": self.nothing_to_distill,
            **asdict(self.all_rows),
            "threshold": self.threshold,
            "least_dependent_share": self.least_dependent_share,
            "num_trajectories": self.num_trajectories,
            "num_unchanged": self.num_unchanged,
            "repositories": {repo: asdict(figures) for repo, figures in self.repositories.items()},
        }


def check_teacher(
    compared: Sequence[ComparedTrajectory],
    *,
    threshold: float = DEPENDENT_NATS,
    least_dependent_share: float = LEAST_DEPENDENT_SHARE,
) -> TeacherCheck:
    """Summarize compared trajectories.

    Args:
        threshold: KL in nats above which a row is dependent.
        least_dependent_share: share of dependent rows, in [0, 1], below which there is nothing to distill.

    Raises:
        DataError: there is no trajectory.
    """
    if not compared:
        raise DataError(
            "the foreign tokens file holds no trajectory; make it again with `hyperagent teacher-check tokens`"
        )
    of_repo: dict[str, list[ComparedTrajectory]] = defaultdict(list)
    for trajectory in compared:
        of_repo[trajectory.repo].append(trajectory)
    return TeacherCheck(
        all_rows=_figures(compared, threshold),
        repositories={repo: _figures(found, threshold) for repo, found in sorted(of_repo.items())},
        num_trajectories=len(compared),
        num_unchanged=sum(trajectory.is_unchanged for trajectory in compared),
        threshold=threshold,
        least_dependent_share=least_dependent_share,
    )


def dependent_rows(
    compared: Sequence[ComparedTrajectory], *, threshold: float = DEPENDENT_NATS
) -> dict[str, NDArray[np.bool_]]:
    """Return by trajectory id which of its N rows depend on the condition, shape [N], in the order of its positions."""
    return {trajectory.trajectory_id: trajectory.kl_N > threshold for trajectory in compared}


def _figures(compared: Sequence[ComparedTrajectory], threshold: float) -> DependenceFigures:
    kl = np.concatenate([trajectory.kl_N for trajectory in compared])
    return DependenceFigures(
        num_rows=len(kl),
        kl=float(kl.mean()),
        dependent_share=float((kl > threshold).mean()),
        own_nll=float(np.concatenate([trajectory.own_nll_N for trajectory in compared]).mean()),
        foreign_nll=float(np.concatenate([trajectory.foreign_nll_N for trajectory in compared]).mean()),
    )
