"""Record why a training process failed, before anything else happens.

Under torchrun every rank that fails writes its traceback, and the first one gives the run its reason. A rank that only
notices that another one is gone waits a moment, so that it does not hide the cause.
"""

from __future__ import annotations

import re
import time
import traceback

from hyperagent.errors import HyperagentError
from hyperagent.storage.file_lock import locked
from hyperagent_trainer.runs.folder import RunFolder

_LOST_PEER = re.compile(r"connection (closed|reset)|broken pipe|gloo|nccl|process group", re.IGNORECASE)
_PEER_WAIT_S = 3.0
_LOCK_WAIT_S = 5.0


def record_failure(folder: RunFolder, error: Exception, *, rank: int, num_ranks: int) -> None:
    """Write the traceback to `errors/rank-N.txt`, and the state "failed" with the reason unless another rank did.

    Args:
        rank: number of the failing rank, from 0.
    """
    folder.errors.mkdir(exist_ok=True)
    text = "".join(traceback.format_exception(error))
    (folder.errors / f"rank-{rank}.txt").write_text(text, encoding="utf-8")
    reason = str(error) if isinstance(error, HyperagentError) else f"{type(error).__name__}: {error}"
    if num_ranks > 1:
        if not isinstance(error, HyperagentError) and _LOST_PEER.search(reason):
            time.sleep(_PEER_WAIT_S)
            reason = (
                "another rank ended without a word; it crashed, or was killed, as the system does for lack of memory "
                f"({' '.join(reason.split())})"
            )
        reason = f"rank {rank}: {reason}"
    with locked(folder.root, exclusive=True, wait_s=_LOCK_WAIT_S):
        status = folder.read_status()
        if status.state != "failed":
            folder.write_status(status.model_copy(update={"state": "failed", "reason": reason, "eta_s": None}))
