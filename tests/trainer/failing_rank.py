"""The training process of a rank, of which rank 1 fails in its second step: `torchrun failing_rank.py RUN_FOLDER`."""

from __future__ import annotations

import os
import sys
from typing import Any

from hyperagent_trainer import worker
from hyperagent_trainer.training import trainer

accumulate = trainer.accumulate_gradients


def fail_in_the_second_step(*arguments: Any, step: int, **options: Any) -> Any:
    if step == 2 and os.environ["RANK"] == "1":
        raise ValueError("the second batch is bad")
    return accumulate(*arguments, step=step, **options)


if __name__ == "__main__":
    trainer.accumulate_gradients = fail_in_the_second_step
    sys.exit(worker.main())
