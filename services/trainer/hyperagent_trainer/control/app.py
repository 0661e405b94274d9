"""Control endpoint of the trainer: routes that translate between HTTP and the supervisor, and a status page.

A caller chooses one of the service's recipes and may override a few numbers within bounds; it cannot specify paths,
commands or modules.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from hyperagent import __version__
from hyperagent.http.app import create_app
from hyperagent.http.run_models import (
    FINAL_STATES,
    ComparisonRequest,
    MetricsBody,
    RecipesBody,
    RunBody,
    RunRequest,
    RunsBody,
)
from hyperagent_trainer.control import events
from hyperagent_trainer.control.status_page import PUBLIC_PATHS, page_router
from hyperagent_trainer.control.supervisor import Supervisor
from hyperagent_trainer.runs.metrics_file import PLACE_PATTERN, START, Place
from hyperagent_trainer.runs.store import MAX_METRIC_LINES, Run

router = APIRouter(prefix="/v1")


def create_control_app(supervisor: Supervisor, *, token: str) -> FastAPI:
    """Create the application for `supervisor`, which is closed when the application shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(supervisor.close)

    app = create_app(
        title="hyperagent trainer", version=__version__, token=token, public_paths=PUBLIC_PATHS, lifespan=lifespan
    )
    app.state.supervisor = supervisor
    app.include_router(router)
    app.include_router(page_router())
    return app


def _supervisor(request: Request) -> Supervisor:
    supervisor: Supervisor = request.app.state.supervisor
    return supervisor


Supervised = Annotated[Supervisor, Depends(_supervisor)]


@router.get("/recipes")
def list_recipes(supervisor: Supervised) -> RecipesBody:
    """List the available recipes."""
    return RecipesBody(recipes=supervisor.recipes())


@router.post("/runs", status_code=status.HTTP_201_CREATED)
def start_run(
    body: RunRequest,
    response: Response,
    supervisor: Supervised,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> RunBody:
    """Start a run or queue it after the active one; a repeated request with the same Idempotency-Key returns its run."""
    run = supervisor.start(body, idempotency_key=idempotency_key)
    response.headers["Location"] = _path(run.run_id)
    return _body(run)


@router.post("/comparisons", status_code=status.HTTP_201_CREATED)
def compare_runs(
    body: ComparisonRequest,
    response: Response,
    supervisor: Supervised,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> RunBody:
    """Compare runs on held-out repositories in a run of its own, whose folder gets the report; the verdict is in their bodies."""
    run = supervisor.compare(body, idempotency_key=idempotency_key)
    response.headers["Location"] = _path(run.run_id)
    return _body(run)


@router.get("/runs")
def list_runs(supervisor: Supervised) -> RunsBody:
    """List all runs, newest first."""
    return RunsBody(runs=[_body(run) for run in supervisor.runs.all()])


@router.get("/runs/{run_id}")
def get_run(run_id: str, supervisor: Supervised) -> RunBody:
    """Get one run."""
    return _body(supervisor.runs.get(run_id))


@router.post("/runs/{run_id}/stop", status_code=status.HTTP_202_ACCEPTED)
def stop_run(run_id: str, supervisor: Supervised) -> RunBody:
    """Save a checkpoint and stop, or leave the queue; the run has stopped once its state is "stopped"."""
    return _body(supervisor.stop(run_id))


@router.post("/runs/{run_id}/pause", status_code=status.HTTP_202_ACCEPTED)
def pause_run(run_id: str, supervisor: Supervised) -> RunBody:
    """Save a checkpoint before the next step and pause; the run is paused once its state is "paused"."""
    return _body(supervisor.pause(run_id))


@router.post("/runs/{run_id}/checkpoint", status_code=status.HTTP_202_ACCEPTED)
def save_checkpoint(run_id: str, supervisor: Supervised) -> RunBody:
    """Save a checkpoint before the next step and continue."""
    return _body(supervisor.checkpoint(run_id))


@router.post("/runs/{run_id}/resume", status_code=status.HTTP_202_ACCEPTED)
def resume_run(run_id: str, supervisor: Supervised) -> RunBody:
    """Continue a paused run, or a stopped or failed run from its last checkpoint."""
    return _body(supervisor.resume(run_id))


@router.get(
    "/runs/{run_id}/metrics",
    description=f"At most {MAX_METRIC_LINES} lines of the run's metrics from `since` on, which is the `next` of an earlier "
    "response or a number of lines to skip. Values that are not finite are null.",
)
def get_metrics(
    run_id: str, supervisor: Supervised, since: Annotated[str, Query(pattern=PLACE_PATTERN)] = str(START)
) -> MetricsBody:
    found = supervisor.runs.metrics(run_id, since=Place.parse(since))
    return MetricsBody(metrics=list(found.values), next=str(found.next), reset=found.is_reset)


@router.get(
    "/runs/{run_id}/events",
    response_class=StreamingResponse,
    responses={status.HTTP_200_OK: {"description": "Server-sent events", "content": {events.MEDIA_TYPE: {}}}},
)
def get_events(
    run_id: str,
    supervisor: Supervised,
    last_event_id: Annotated[str, Header(pattern=PLACE_PATTERN)] = str(START),
) -> StreamingResponse:
    """Stream `status` and `metrics` until the run has ended or the service stops; `reset` means that the metrics restart after a resume."""
    supervisor.runs.get(run_id)  # An unknown run is answered with 404 instead of a stream.
    stream = events.run_events(
        supervisor.runs, run_id, since=Place.parse(last_event_id), is_closing=supervisor.is_closing.is_set
    )
    return StreamingResponse(stream, media_type=events.MEDIA_TYPE, headers={"Cache-Control": "no-cache"})


def _path(run_id: str) -> str:
    return f"/v1/runs/{run_id}"


def _body(run: Run) -> RunBody:
    path = _path(run.run_id)
    links = {"self": path, "metrics": f"{path}/metrics", "events": f"{path}/events"}
    if run.status.state not in FINAL_STATES:
        is_training = run.status.state != "queued" and isinstance(run.request, RunRequest)
        commands = ("stop", "pause", "checkpoint") if is_training else ("stop",)
        links |= {command: f"{path}/{command}" for command in commands}
    if run.is_resumable or run.status.state == "paused":
        links["resume"] = f"{path}/resume"
    return RunBody(
        id=run.run_id,
        kind="training" if isinstance(run.request, RunRequest) else "comparison",
        recipe=run.request.recipe if isinstance(run.request, RunRequest) else "comparison",
        folder=str(run.folder.root),
        verdict=run.folder.read_verdict(),
        links=links,
        **run.status.model_dump(),
    )
