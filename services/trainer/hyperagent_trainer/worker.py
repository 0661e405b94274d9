"""One rank of a training process: `python -m hyperagent_trainer.worker RUN_FOLDER`.

SIGTERM and SIGINT save a checkpoint and end the run as "stopped". `HYPERAGENT_REDIS_URL` is the URL of the cache's hot
tier, as for the teacher.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

from hyperagent_trainer.runs.stop_request import StopRequest


def main() -> int:
    stop = StopRequest()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return _train(Path(sys.argv[1]), stop)


def _train(root: Path, stop: StopRequest) -> int:
    # Imported late: importing torch takes seconds, and the signal handlers must be installed before that.
    from hyperagent.errors import HyperagentError
    from hyperagent.logs import configure_logging
    from hyperagent_trainer.runs.failure import record_failure
    from hyperagent_trainer.runs.folder import RunFolder
    from hyperagent_trainer.training.trainer import train

    configure_logging(service="trainer")
    folder = RunFolder(root)
    try:
        train(folder.read_recipe(), folder, stop, redis_url=os.environ.get("HYPERAGENT_REDIS_URL"))
    except Exception as error:  # Whatever it is, it is the run's reason, and peers must not wait for this rank.
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        record_failure(folder, error, rank=int(os.environ.get("RANK", "0")), num_ranks=num_ranks)
        if isinstance(error, HyperagentError):
            print(str(error), file=sys.stderr)  # noqa: T201
        else:
            traceback.print_exc()
        if num_ranks > 1:
            # Leaving the process group in order would wait for ranks that are in the middle of a collective operation.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
