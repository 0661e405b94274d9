"""Process of a run that compares other runs: `python -m hyperagent_trainer.comparison.worker RUN_FOLDER`.

It writes the report to the run's folder, and the verdict to the compared runs. SIGTERM and SIGINT end it as "stopped" after
the current trajectory; nothing is written then.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hyperagent_trainer.runs.stop_request import StopRequest

if TYPE_CHECKING:
    from hyperagent.http.run_models import RunState
    from hyperagent_trainer.runs.folder import RunFolder

_STATUS_INTERVAL_S = 0.5


class _Stopped(Exception):
    pass


def main() -> int:
    stop = StopRequest()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return _compare(Path(sys.argv[1]), stop)


def _compare(root: Path, stop: StopRequest) -> int:
    # Imported late: importing torch takes seconds, and the signal handlers must be installed before that.
    from hyperagent.errors import HyperagentError
    from hyperagent.http.run_models import ComparisonRequest
    from hyperagent.logs import configure_logging
    from hyperagent_trainer.comparison.command import EvaluationRequest, evaluate, write_report
    from hyperagent_trainer.comparison.keep_verdict import keep_verdict
    from hyperagent_trainer.runs.folder import RunFolder
    from hyperagent_trainer.runs.store import Runs

    configure_logging(service="trainer")
    folder = RunFolder(root)
    updated = 0.0

    def report_progress(done: int, total: int) -> None:
        nonlocal updated
        if stop.is_set():
            raise _Stopped
        if time.monotonic() - updated >= _STATUS_INTERVAL_S or done == total:
            _write(folder, "running", step=done, num_steps=total)
            updated = time.monotonic()

    try:
        runs = Runs(root.parent)
        asked = runs.get(root.name).request
        assert isinstance(asked, ComparisonRequest)
        _write(folder, "loading")
        request = EvaluationRequest(
            own=[runs.folder(run_id).root for run_id in asked.own],
            static=[runs.folder(run_id).root for run_id in asked.static],
            trained_on_shuffled=[runs.folder(run_id).root for run_id in asked.trained_on_shuffled],
            split=asked.split,
            margin=asked.margin,
            seed=asked.seed,
        )
        report = evaluate(request, progress=report_progress)
        write_report(folder.evaluation, report)
        keep_verdict(request.own, report, folder.evaluation)
    except _Stopped:
        _write(folder, "stopped", reason="stopped on request; start the comparison again for its report")
        return 0
    except HyperagentError as error:
        _write(folder, "failed", reason=str(error))
        print(str(error), file=sys.stderr)  # noqa: T201
        return 1
    _write(folder, "done")
    return 0


def _write(folder: RunFolder, state: RunState, **changes: str | int) -> None:
    status = folder.read_status()
    folder.write_status(status.model_copy(update={"state": state, "updated_at": time.time(), **changes}))


if __name__ == "__main__":
    sys.exit(main())
