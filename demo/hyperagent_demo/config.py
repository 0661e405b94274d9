"""Configuration of the demo."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hyperagent.config import StrictModel
from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.model.config import HyperNetworkConfig
from hyperagent_demo.samples import SampleName


class PretrainConfig(StrictModel):
    """Size of a tiny model, and the length of its pre-training."""

    hidden_size: int = Field(ge=16, multiple_of=16)
    num_layers: int = Field(ge=1)
    num_experts: int = Field(ge=2)
    num_steps: int = Field(ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(ge=1)
    """Number of trajectories per step."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    supervised_only: bool = False
    """Whether the loss is over the supervised tokens only, instead of all tokens."""
    max_seconds: float | None = Field(None, gt=0)
    """Time limit in seconds, if any; on a slow machine it stops pre-training early, and the report says so."""


class DistillConfig(StrictModel):
    """The trainer's recipe without the paths, which the demo fills in."""

    hypernetwork: HyperNetworkConfig
    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    checkpoint_activations: bool
    learning_rate: float = Field(gt=0)
    b_head_learning_rate_factor: float = Field(1.0, gt=0)
    warmup_steps: int = Field(ge=0)
    evaluate_every: int = Field(ge=1)


class StaticConfig(StrictModel):
    """Runs of a static LoRA; everything else is as in the hypernetwork's recipe."""

    num_steps: int = Field(ge=1)
    learning_rates: tuple[float, ...] = Field(min_length=1)
    """Learning rates to train with; the run with the lowest held-out KL is the baseline, which favors it."""


class DemoConfig(StrictModel):
    """Configuration of one run of the whole loop."""

    seed: int = Field(0, ge=0, lt=2**31)
    sample: SampleName = "rules"
    """Sample to generate if no data file is given."""
    sample_rows: int = Field(120, ge=8)
    """Number of trajectories to generate if no data file is given."""
    vocab_size: int = Field(2048, ge=512)
    """Vocabulary size of the tokenizer that is trained if none is given."""
    views: ViewSettings
    """Contents and length limits of the three views."""
    max_rows: int | None = Field(None, ge=4)
    """Maximum number of rows to sample from a data file by the seed; None uses all."""
    held_out_share: float = Field(0.2, gt=0, lt=1)
    """Fraction of the repositories that training never sees."""
    top_k: int = Field(128, ge=1)
    """Number of ids that the teacher keeps per row."""
    teacher: PretrainConfig
    student: PretrainConfig
    teacher_check_rows: int = Field(48, ge=2)
    """Number of held-out trajectories that the teacher also scores under another repository's condition."""
    distill: DistillConfig
    static: StaticConfig
    """A static LoRA of the same rank and targets."""


Role = Literal["teacher", "student"]
