"""The command of a training process."""

from __future__ import annotations

import math
import sys

_WORKER = ("-m", "hyperagent_trainer.worker")


def training_command(processes: int, *, stop_grace_s: float) -> tuple[str, ...]:
    """The training process of a recipe with so many `processes`; the run's folder follows.

    Several are started, ended and watched by torchrun (https://docs.pytorch.org/docs/stable/elastic/run.html), which
    passes SIGTERM on to each.

    Args:
        stop_grace_s: what the processes have to save and end after SIGTERM.
    """
    if processes == 1:
        return (sys.executable, *_WORKER)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    # Its own default is half a minute, after which it kills a rank that still writes its checkpoint.
    grace = f"--shutdown-timeout={math.ceil(stop_grace_s)}"
    return (*torchrun, f"--nproc-per-node={processes}", grace, *_WORKER)
