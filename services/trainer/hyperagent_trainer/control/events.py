"""Server-sent events of a run (https://html.spec.whatwg.org/multipage/server-sent-events.html).

`status`   the whole status, whenever it has changed
`metrics`  one line of the metrics; its id is the place after it, from which Last-Event-ID continues
`reset`    the lines sent before are invalid, because a resumed run repeats their steps; all lines are sent again
`problem`  the reason why nothing more can be read

Only `metrics` events change the id. The stream ends after a final state, and when the service stops; while nothing happens, comments keep proxies
from closing it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.concurrency import run_in_threadpool

from hyperagent.errors import HyperagentError
from hyperagent.http.problems import one_line
from hyperagent.http.run_models import FINAL_STATES, RunStatus
from hyperagent_trainer.runs.metrics_file import Place
from hyperagent_trainer.runs.store import Runs

MEDIA_TYPE = "text/event-stream"

_POLL_S = 0.5
_HEARTBEAT_S = 15.0
_LINES_AT_ONCE = 500


async def run_events(
    runs: Runs, run_id: str, *, since: Place, is_closing: Callable[[], bool] = lambda: False
) -> AsyncIterator[str]:
    """Yield the run's status and its metrics from `since` on, until it has ended or the service is closing.

    The generator holds at most a batch of lines and no open file between reads, so a disconnected client leaks nothing.
    """
    sent_status: RunStatus | None = None
    sent_at = time.monotonic()
    while True:
        try:
            # The status is read first: if it is final, the lines read afterwards are complete.
            status = (await run_in_threadpool(runs.get, run_id)).status
            found = await run_in_threadpool(runs.metrics, run_id, since=since, limit=_LINES_AT_ONCE)
        except HyperagentError as error:
            yield _event("problem", {"detail": one_line(str(error))})
            return
        events = [_event("reset", {})] if found.is_reset else []
        events += [_event("metrics", line, place) for line, place in zip(found.values, found.places, strict=True)]
        since = found.next
        may_be_more = len(found.values) == _LINES_AT_ONCE
        if status != sent_status and not may_be_more:
            events.append(_event("status", status.model_dump()))
            sent_status = status
        if not events and time.monotonic() - sent_at >= _HEARTBEAT_S:
            events.append(": still here\n\n")
        if events:
            yield "".join(events)
            sent_at = time.monotonic()
        # A service that stops waits for its streams, so they end first; the client continues with Last-Event-ID.
        if is_closing():
            return
        if may_be_more:
            continue
        if status.state in FINAL_STATES:
            return
        await asyncio.sleep(_POLL_S)


# Not `fastapi.sse`, because it writes the id after the data and its own heartbeat, which would change the format.
def _event(name: str, data: dict[str, Any], place: Place | None = None) -> str:
    identifier = "" if place is None else f"id: {place}\n"
    return f"{identifier}event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n"
