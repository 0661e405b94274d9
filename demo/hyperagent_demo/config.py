"""What the demo is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hyperagent.config import StrictModel
from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.model.config import HyperNetworkConfig


class PretrainConfig(StrictModel):
    """A tiny model and how long it is pre-trained before the loop begins."""

    hidden_size: int = Field(ge=16, multiple_of=16)
    num_layers: int = Field(ge=1)
    num_experts: int = Field(ge=2)
    num_steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(ge=1)
    """Trajectories per step."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    max_seconds: float = Field(gt=0)
    """Stop after this long even if steps are left; a slow machine then gets a weaker model, and is told so."""


class DistillConfig(StrictModel):
    """The trainer's recipe, but for the paths, which the demo fills in."""

    hypernetwork: HyperNetworkConfig
    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    checkpoint_activations: bool
    learning_rate: float = Field(gt=0)
    b_head_learning_rate_factor: float = Field(1.0, gt=0)
    warmup_steps: int = Field(ge=0)
    evaluate_every: int = Field(ge=1)


class DemoConfig(StrictModel):
    """One run of the whole loop."""

    seed: int = Field(0, ge=0, lt=2**31)
    sample_rows: int = Field(120, ge=8)
    """Trajectories to generate when no data file is given."""
    vocab_size: int = Field(2048, ge=512)
    """Entries of the tokenizer to train when none is given."""
    views: ViewSettings
    """Who sees what of a trajectory."""
    max_rows: int | None = Field(None, ge=4)
    """Take this many rows of a data file, drawn by the seed, instead of all."""
    held_out_share: float = Field(0.2, gt=0, lt=1)
    """Share of the repositories that training never sees."""
    top_k: int = Field(128, ge=1)
    """Ids the teacher keeps per row."""
    teacher: PretrainConfig
    student: PretrainConfig
    distill: DistillConfig


Role = Literal["teacher", "student"]
