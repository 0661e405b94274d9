"""Options of the loss that a recipe can set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hyperagent.config import StrictModel

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]
LossBackend = Literal["auto", "torch", "triton"]
"""Backend of the loss: PyTorch on a CPU or GPU, or Triton kernels on a GPU; "auto" is PyTorch."""

_JSD_BETA = 0.5


class LossOptions(StrictModel):
    """The divergence from the teacher and the weight of the cross-entropy with the actual token."""

    divergence: Divergence = "forward_kl"
    """Divergence between the teacher's row and the student's, over the buckets "each kept id" and "any other id"."""
    jsd_beta: float = Field(_JSD_BETA, gt=0, lt=1)
    """The teacher's weight in the mixture of "jsd"; near 0 it behaves like forward KL, near 1 like reverse KL."""
    ce_weight: float = Field(0.0, ge=0, le=1)
    """w in (1 - w) * divergence + w * cross-entropy with the actual token, at temperature 1."""

    @model_validator(mode="after")
    def _beta_has_a_use(self) -> LossOptions:
        if self.divergence != "jsd" and self.jsd_beta != _JSD_BETA:
            raise ValueError(f'jsd_beta belongs to divergence "jsd", not "{self.divergence}"; leave it out')
        return self
