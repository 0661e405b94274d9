"""The distillation loss, fused with the student's frozen output head: docs/loss.md has the formulas and the limits."""

from hyperagent_trainer.loss.distillation import compute_distillation_loss, default_workspace_bytes
from hyperagent_trainer.loss.options import LossOptions

__all__ = ["LossOptions", "compute_distillation_loss", "default_workspace_bytes"]
