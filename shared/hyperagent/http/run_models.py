"""What the trainer's control endpoint reads and answers; the service and its client share these models."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from hyperagent.config import StrictModel

RunState = Literal["queued", "loading", "running", "saving", "paused", "stopped", "failed", "done"]

FINAL_STATES: frozenset[RunState] = frozenset({"stopped", "failed", "done"})
"""No process belongs to a run in one of these."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a recipe may be called."""


class RunOverrides(StrictModel):
    """What `POST /v1/runs` may change of a named recipe, with the bounds it may change it within."""

    num_steps: int | None = Field(None, ge=1, le=1_000_000)
    """Optimizer steps."""
    batch_size: int | None = Field(None, ge=1, le=256)
    """Trajectories per step."""
    learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak learning rate."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """Seeds the network's start and the order of the data."""

    @field_validator("*", mode="before")
    @classmethod
    def _is_a_number(cls, value: object) -> object:
        # Pydantic would read `true` and "1" as numbers, against the schema; its strict mode would refuse 1.0, which is an
        # integer in JSON.
        if isinstance(value, (bool, str)):
            raise ValueError("Input should be a number")
        return value


class RunRequest(StrictModel):
    """What a caller asks for: a recipe by name, and what to change of it."""

    recipe: str = Field(pattern=NAME_PATTERN)
    """Name of a recipe the service knows."""
    overrides: RunOverrides = RunOverrides()


class RunStatus(StrictModel):
    """How a run is doing."""

    state: RunState
    reason: str = ""
    """Why, for "failed" and "stopped"."""
    step: int = 0
    """Optimizer steps done."""
    num_steps: int
    loss: float | None = None
    """Training loss of the last step, nats per supervised token."""
    skipped_steps: int = 0
    """Since the process was started: steps left out because their loss or gradient was not finite."""
    tokens_per_s: float | None = None
    """Tokens, context included, over the last steps."""
    eta_s: float | None = None
    """Seconds until the last step, at the present speed; None unless it is running."""
    held_out_kl: dict[str, float | None] = Field(default_factory=dict)
    """The last evaluation: nats per supervised token, by arm; None for what was not finite."""
    conditioning: dict[str, str] = Field(default_factory=dict)
    """Its verdict on what the own prompt is worth, by split (`hyperagent_trainer.evaluation.conditioning`)."""
    adapters_collapsed: bool = False
    """Whether the last evaluation found that different prompts get the same adapter."""
    updated_at: float = Field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def progress_note(self) -> str:
        """State, loss and speed in a few words, for a progress bar."""
        if self.loss is None:
            return self.state
        return f"{self.state} · loss {self.loss:.3f} · {self.tokens_per_s or 0:,.0f} tokens/s"


class RunBody(RunStatus):
    """A run: its status, and where to go from here."""

    id: str
    recipe: str
    """The recipe's name."""
    folder: str
    """Where the service keeps the run's files; a finished run's bundle lies in it."""
    links: dict[str, str]
    """Addresses of the run, of its metrics, and of what can be done with it now."""


class RunsBody(BaseModel):
    runs: list[RunBody]


class RecipesBody(BaseModel):
    recipes: list[str]


class MetricsBody(BaseModel):
    metrics: list[dict[str, Any]]
    next: str = Field(description="`since` of the next call")
    reset: bool = Field(
        description="Whether the lines before `since` are no longer there, as after a resume; then `metrics` begins with "
        "the first line of all, and what was read before is to be forgotten"
    )
