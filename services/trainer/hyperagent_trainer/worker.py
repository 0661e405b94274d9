"""One rank of a training process: `python -m hyperagent_trainer.worker RUN_FOLDER`.

SIGTERM and SIGINT save a checkpoint and end the run as "stopped". `HYPERAGENT_REDIS_URL` is the URL of the cache's hot
tier, as for the teacher.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path


def main() -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return _train(Path(sys.argv[1]), stop)


def _train(root: Path, stop: threading.Event) -> int:
    # Imported late: importing torch takes seconds, and the signal handlers must be installed before that.
    from hyperagent.errors import HyperagentError
    from hyperagent.logs import configure_logging
    from hyperagent_trainer.runs.folder import RunFolder
    from hyperagent_trainer.training.trainer import train

    configure_logging(service="trainer")
    folder = RunFolder(root)
    try:
        train(folder.read_recipe(), folder, stop, redis_url=os.environ.get("HYPERAGENT_REDIS_URL"))
    except HyperagentError as error:
        status = folder.read_status()
        folder.write_status(status.model_copy(update={"state": "failed", "reason": str(error)}))
        print(str(error), file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
