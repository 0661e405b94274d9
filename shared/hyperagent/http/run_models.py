"""Request and response models of the trainer's control endpoint, shared by the service and its client."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from hyperagent.config import StrictModel

RunState = Literal["queued", "loading", "running", "saving", "paused", "stopped", "failed", "done"]

FINAL_STATES: frozenset[RunState] = frozenset({"stopped", "failed", "done"})
"""States in which a run has no process."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Pattern of recipe names."""


class RunOverrides(StrictModel):
    """Fields of a recipe that `POST /v1/runs` may override, with their bounds."""

    num_steps: int | None = Field(None, ge=1, le=1_000_000)
    """Number of optimizer steps."""
    batch_size: int | None = Field(None, ge=1, le=256)
    """Number of trajectories per step."""
    learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak learning rate."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """Seed of the network's initialization and of the data order."""

    @field_validator("*", mode="before")
    @classmethod
    def _is_a_number(cls, value: object) -> object:
        # Pydantic would accept `true` and "1" as numbers, against the schema; its strict mode would refuse 1.0,
        # which is an integer in JSON.
        if isinstance(value, (bool, str)):
            raise ValueError("Input should be a number")
        return value


class RunRequest(StrictModel):
    """Request for a run: the name of a recipe and its overrides."""

    recipe: str = Field(pattern=NAME_PATTERN)
    """Name of a recipe of the service."""
    overrides: RunOverrides = RunOverrides()


RunId = Annotated[str, Field(pattern=r"^\d{8}-\d{6}-\d{6}$")]


class ComparisonRequest(StrictModel):
    """Request for a run that compares training runs of the service, as `hyperagent evaluate` does."""

    own: list[RunId] = Field(min_length=1, max_length=16)
    """Hypernetwork runs that differ in their seed only."""
    static: list[RunId] = Field(default=[], max_length=16)
    """Static runs, one for each seed."""
    trained_on_shuffled: list[RunId] = Field(default=[], max_length=16)
    """Runs with `prompts: shuffled`, one for each seed."""
    split: str = Field("held_out", max_length=64)
    """Split of the tokens file to evaluate on."""
    margin: float = Field(0.05, ge=0, le=0.99)
    """Least advantage that counts, as a share of the frozen student's KL."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the shuffled prompts and the intervals."""


class RunStatus(StrictModel):
    """Status of a run."""

    state: RunState
    reason: str = ""
    """Reason for the states "failed" and "stopped"."""
    step: int = 0
    """Number of completed optimizer steps; of a comparison, number of trajectories done, in every arm."""
    num_steps: int
    loss: float | None = None
    """Training loss of the last step in nats per supervised token."""
    skipped_steps: int = 0
    """Number of steps skipped since the process started because their loss or gradient was not finite."""
    tokens_per_s: float | None = None
    """Tokens per second, context included, over the last steps."""
    eta_s: float | None = None
    """Estimated seconds until the last step at the current speed; None unless the run is running."""
    held_out_kl: dict[str, float | None] = Field(default_factory=dict)
    """KL of the last evaluation in nats per supervised token, by arm; None for values that were not finite."""
    conditioning: dict[str, str] = Field(default_factory=dict)
    """What own prompts gain in the last evaluation, in words, by split (see `hyperagent_trainer.evaluation.conditioning`)."""
    adapters_collapsed: bool = False
    """Whether the last evaluation found that different prompts get the same adapter."""
    updated_at: float = Field(default_factory=time.time)
    """Time of the last update in seconds since the epoch."""

    @property
    def progress_note(self) -> str:
        """Short text with state, loss and speed for a progress bar."""
        if self.loss is None:
            return self.state
        return f"{self.state} · loss {self.loss:.3f} · {self.tokens_per_s or 0:,.0f} tokens/s"


class RunVerdict(StrictModel):
    """Whether conditioning pays, as the last `hyperagent evaluate` of a run found."""

    verdict: str | None
    """One of the verdicts of docs/evaluation.md; None if the evaluation had no other trained arm."""
    reason: str
    """One sentence with the numbers that the verdict follows from."""
    margin: float
    """Least advantage that counts, as a share of the frozen student's KL."""
    step: int
    """Optimizer step of the evaluated checkpoint."""
    split: str
    """Split of the tokens file that was evaluated."""
    num_repositories: int
    num_seeds: int
    """Number of training seeds."""
    report: str
    """Folder of the whole report on the machine that made it."""


class RunBody(RunStatus):
    """A run with its status and links to possible actions."""

    id: str
    kind: Literal["training", "comparison"] = "training"
    recipe: str
    """Name of the recipe; of a comparison, "comparison"."""
    folder: str
    """Folder of the run's files on the service's machine, including the bundle of a finished run."""
    verdict: RunVerdict | None = None
    """Verdict of the run's last evaluation; None if it was not evaluated."""
    links: dict[str, str]
    """Links to the run, its metrics, and the actions that are currently possible."""


class RunsBody(BaseModel):
    runs: list[RunBody]


class RecipesBody(BaseModel):
    recipes: list[str]


class MetricsBody(BaseModel):
    metrics: list[dict[str, Any]]
    next: str = Field(description="`since` for the next call")
    reset: bool = Field(
        description="Whether the lines before `since` no longer exist, as after a resume; then `metrics` begins with "
        "the very first line, and the caller must discard all lines that it has read before"
    )
