"""Track the best evaluation, to end a run once its held-out KL has stopped falling."""

from __future__ import annotations

import math

from hyperagent.config import StrictModel


class BestEvaluation(StrictModel):
    """The best evaluation so far; part of a checkpoint, so that a resumed run ends at the same step."""

    step: int = 0
    """Optimizer steps done at the best evaluation."""
    kl: float | None = None
    """Held-out KL under the prompts' own adapters, nats per supervised token; None before the first evaluation."""
    waited: int = 0
    """Evaluations since the best one."""

    def after(self, step: int, kl: float) -> BestEvaluation:
        """Return the state after one more evaluation; NaN is no improvement."""
        if kl < (math.inf if self.kl is None else self.kl):
            return BestEvaluation(step=step, kl=kl)
        return self.model_copy(update={"waited": self.waited + 1})
