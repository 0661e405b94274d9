"""What a recipe may choose about the loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hyperagent.config import StrictModel

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]
LossBackend = Literal["auto", "torch", "triton"]
"""What computes the loss: PyTorch on a CPU or GPU, or Triton kernels on a GPU; "auto" is PyTorch."""

_JSD_BETA = 0.5


class LossOptions(StrictModel):
    """The divergence from the teacher, and what the token that really stands there adds to it."""

    divergence: Divergence = "forward_kl"
    """Between the teacher's row and the student's, in the buckets "each kept id" and "any other id"."""
    jsd_beta: float = Field(_JSD_BETA, gt=0, lt=1)
    """The teacher's weight in the mixture of "jsd"; near 0 it behaves like forward KL, near 1 like reverse KL."""
    ce_weight: float = Field(0.0, ge=0, le=1)
    """w of (1 - w) * divergence + w * cross-entropy with the token that really stands there, at temperature 1."""

    @model_validator(mode="after")
    def _beta_has_a_use(self) -> LossOptions:
        if self.divergence != "jsd" and self.jsd_beta != _JSD_BETA:
            raise ValueError(f'jsd_beta belongs to divergence "jsd", not to "{self.divergence}"; leave it out')
        return self
