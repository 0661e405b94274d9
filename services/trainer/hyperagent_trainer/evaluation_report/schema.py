"""Contents of `evaluation.json`, version 1: what an evaluation writes and the report shows.

Optional parts that were not measured are None. No number is NaN or infinite. KL divergences are KL(teacher || student) in
nats per supervised row, natural logarithm, and shares are fractions between 0 and 1 unless a field says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from hyperagent.config import StrictModel
from hyperagent_trainer.evaluation.arms import FROZEN, OWN, REPORT_ARMS
from hyperagent_trainer.evaluation.verdict import HARMFUL, PAYS, STATIC_SUFFICES, UNDECIDED

VERDICTS = (PAYS, STATIC_SUFFICES, UNDECIDED, HARMFUL)


def _known_arm(name: str) -> str:
    if name not in REPORT_ARMS:
        raise ValueError(f"there is no arm {name!r}; the arms are {', '.join(REPORT_ARMS)}")
    return name


def _known_verdict(verdict: str) -> str:
    if verdict not in VERDICTS:
        raise ValueError(f"there is no verdict {verdict!r}; the verdicts are {', '.join(map(repr, VERDICTS))}")
    return verdict


# Rounding can leave a sum of divergences slightly below zero, and a cosine slightly above one.
Kl = Annotated[float, Field(ge=-1e-6)]
Cosine = Annotated[float, Field(ge=-1.001, le=1.001)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
ArmName = Annotated[str, AfterValidator(_known_arm)]
Verdict = Annotated[str, AfterValidator(_known_verdict)]


class _Part(StrictModel):
    model_config = ConfigDict(allow_inf_nan=False)


class EvaluatedRun(_Part):
    """The training run whose hypernetwork was evaluated; the first one of several seeds."""

    folder: str
    """Path of the run's folder."""
    step: Annotated[int, Field(ge=0)]
    """Optimizer step of the evaluated checkpoint."""
    seed: int
    """The run's own seed."""


class ArmResult(_Part):
    """Metrics of one arm over all held-out rows, the mean over its training seeds."""

    kl: Kl
    """KL divergence from the teacher."""
    gap_closed: float | None
    """(KL_frozen - KL) / KL_frozen; below 0 where the arm is worse than the frozen student. None for the frozen student
    itself, and where its KL is 0."""
    gap_low: float | None
    """Lower bound of the 95% interval of `gap_closed` over repositories; None if there is no interval."""
    gap_high: float | None
    """Upper bound of the 95% interval of `gap_closed` over repositories; None if there is no interval."""
    top1_agreement: Share
    """Share of rows where the most likely token is the teacher's."""
    perplexity: Annotated[float, Field(ge=0)]
    """Exponential of the mean negative log-likelihood of the recorded tokens."""
    tool_calls_exact: Share | None
    """Share of tool calls whose every token is the most likely one; None if the trajectories have no recognized calls."""
    dependent_kl: Kl | None
    """KL on the rows where the teacher depends on the condition; None if those rows are not known."""
    other_kl: Kl | None
    """KL on the other rows; None if the dependent rows are not known."""
    num_seeds: Count
    """Number of trainings that the arm is the mean of."""

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        _check_bounds(self.gap_low, self.gap_high)
        if self.gap_low is not None and self.gap_closed is None:
            raise ValueError("gap_low and gap_high are an interval of gap_closed, which is null")
        return self


class Estimate(_Part):
    """A mean difference in nats per supervised row, with its 95% interval over repositories."""

    mean: float
    """KL of the other arm minus KL of the own prompt."""
    low: float | None
    """Lower bound; None if there are too few repositories for an interval."""
    high: float | None
    """Upper bound; None if there are too few repositories for an interval."""

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        _check_bounds(self.low, self.high)
        return self


class Conditioning(_Part):
    """Whether reading the prompt pays, and what that follows from."""

    verdict: Verdict | None
    """One of the outcomes of `evaluation.verdict`; None if no other trained arm was evaluated."""
    reason: str
    """One sentence with the numbers that the verdict follows from."""
    margin: Annotated[float, Field(ge=0, lt=1)]
    """Least advantage that counts, as a share of the frozen student's KL."""
    num_clusters: Count
    """Number of repositories that the intervals are over."""
    conditioning_gain: Estimate | None = None
    """KL_shuffled - KL_own; None without that arm."""
    over_static: Estimate | None = None
    """KL_static - KL_own; None without that arm."""
    over_trained_on_shuffled: Estimate | None = None
    """KL_trained_on_shuffled - KL_own; None without that arm."""
    over_frozen: Estimate | None = None
    """KL_frozen - KL_own."""


class PositionBin(_Part):
    """KL of the rows at a range of positions in what the student reads."""

    first: Annotated[int, Field(ge=0)]
    """First position of the range, in tokens."""
    last: Annotated[int, Field(ge=0)]
    """Last position of the range, included."""
    num_rows: Count
    """Number of rows in the range."""
    kl: dict[ArmName, Kl]
    """Mean KL of these rows, by arm."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.last < self.first:
            raise ValueError(f"the last position {self.last} is before the first, {self.first}")
        return self


class TokenClass(_Part):
    """KL of the rows of one class of token."""

    name: str
    """The class, such as `tool call`."""
    num_rows: Count
    """Number of rows of the class."""
    kl: dict[ArmName, Kl]
    """Mean KL of these rows, by arm."""


class Similarity(_Part):
    """How much the adapters of the held-out repositories resemble each other."""

    repositories: Annotated[list[str], Field(min_length=2)]
    """Names of the P repositories, one prompt each."""
    cosine: list[list[Cosine]]
    """Cosine between the weight changes of two repositories' adapters, symmetric, shape [P, P]."""
    mean_cosine: Cosine
    """Mean over all pairs of different repositories."""
    own_beats_others: Share
    """Share of held-out trajectories on which the adapter of the own prompt has a smaller KL than those of other
    repositories' prompts; about one half if the adapters ignore the prompt."""

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        num = len(self.repositories)
        if [len(row) for row in self.cosine] != [num] * num:
            raise ValueError(f"{num} repositories need a cosine matrix of {num} rows of {num} numbers")
        return self


class TeacherCheck(_Part):
    """Whether the teacher's distributions depend on the condition."""

    kl: Kl
    """Mean KL between the teacher's rows with the own condition and with another repository's."""
    dependent_share: Share
    """Share of rows whose KL is above `threshold`."""
    threshold: Annotated[float, Field(ge=0)]
    """KL above which a row counts as dependent, in nats."""
    num_rows: Count
    """Number of rows that were compared."""
    nothing_to_distill: bool
    """Whether so few rows depend on the condition that an adapter cannot learn anything from it."""


class Interference(_Part):
    """How much an adapter changes the student on text that has nothing to do with its prompt."""

    kl_frozen_to_adapted: Kl
    """KL(student alone || student with the adapter), in nats per row of that text."""
    num_rows: Count
    """Number of rows of that text."""


class OutOfDistribution(_Part):
    """How unlike the training prompts the held-out prompts are, by the score that flags unusual prompts."""

    held_out_median: float
    """Median score of the held-out prompts; a larger score is more unlike training."""
    threshold: float
    """Score above which a prompt is flagged."""
    share_flagged: Share
    """Share of held-out prompts that are flagged."""


class Cost(_Part):
    """What an adapter and the evaluation cost."""

    adapter_ms: Annotated[float, Field(ge=0)]
    """Time to generate one adapter, in milliseconds."""
    adapter_parameters: Count
    """Number of weights of one adapter."""
    adapter_bytes: Count
    """Size of one adapter's weights, in bytes."""
    evaluation_s: Annotated[float, Field(ge=0)]
    """Time of the whole evaluation, in seconds."""


class RuleCheck(_Part):
    """Whether a text follows one rule that only the condition states."""

    name: str
    """What the rule is about."""
    value: str
    """What the rule requires, as it would appear in the text."""
    followed: bool
    """Whether the text follows it."""


class GeneratedText(_Part):
    """What the student writes under one arm."""

    arm: ArmName
    """The arm whose adapter the student had."""
    prompt: str
    """The task, as the student reads it."""
    text: str
    """The student's continuation."""
    rules: list[RuleCheck]
    """The rules that were checked, possibly none."""


class EvaluationReport(_Part):
    """One evaluation on held-out trajectories."""

    version: Literal[1]
    """Version of this format."""
    run: EvaluatedRun
    view: Literal["internalized", "full"]
    """Whether parts of the condition are hidden from the student, or it reads the whole trajectory."""
    split: str
    """Split of the tokens file that was evaluated."""
    num_repositories: Count
    """Number of evaluated repositories."""
    num_trajectories: Count
    """Number of evaluated trajectories."""
    num_rows: Count
    """Number of supervised rows of all evaluated trajectories."""
    num_seeds: Count
    """Number of training seeds of the own prompt's arm."""
    arms: dict[ArmName, ArmResult]
    """Metrics by arm; the frozen student and the own prompt are always there."""
    conditioning: Conditioning
    by_position: list[PositionBin]
    """Ranges of positions in ascending order."""
    by_class: list[TokenClass]
    similarity: Similarity | None = None
    """None if it was not measured, or there are fewer than two repositories."""
    teacher_check: TeacherCheck | None = None
    """None if the teacher was not checked."""
    interference: Interference | None = None
    """None if it was not measured."""
    out_of_distribution: OutOfDistribution | None = None
    """None if it was not measured."""
    cost: Cost | None = None
    """None if it was not measured."""
    texts: list[GeneratedText] | None = None
    """None if no texts were generated."""

    @model_validator(mode="after")
    def _check_arms(self) -> Self:
        if missing := [arm for arm in (FROZEN, OWN) if arm not in self.arms]:
            raise ValueError(f"the arm {missing[0]!r} is missing; a report needs {FROZEN!r} and {OWN!r}")
        parts = [*(one.kl for one in self.by_position), *(one.kl for one in self.by_class)]
        if unknown := sorted({arm for kl in parts for arm in kl} - self.arms.keys()):
            raise ValueError(f"by_position or by_class has the arm {unknown[0]!r}, which is not in arms; add it there")
        return self


def _check_bounds(low: float | None, high: float | None) -> None:
    if (low is None) != (high is None):
        raise ValueError("an interval has only one bound; give both, or null for both")
    if low is not None and high is not None and high < low:
        raise ValueError(f"the upper bound {high:g} is below the lower bound {low:g}")
