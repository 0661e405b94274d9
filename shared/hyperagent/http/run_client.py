"""Client of the trainer: start, monitor and control training runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

from hyperagent.http.client import ApiClient, AsyncApiClient, Call, json_of
from hyperagent.http.run_models import (
    FINAL_STATES,
    ComparisonRequest,
    MetricsBody,
    RecipesBody,
    RunBody,
    RunRequest,
    RunsBody,
)

_FOLLOW_POLL_S = 0.5


class RunClient(ApiClient):
    """Connection to one trainer; raises the same errors as `ApiClient`."""

    def recipes(self) -> list[str]:
        """Return the names of the available recipes."""
        return self.send(_RECIPES).recipes

    def start(self, request: RunRequest, *, idempotency_key: str | None = None) -> RunBody:
        """Start a run or queue it after the active one; repeating a request with the same key starts only one run.

        Raises:
            NotFound: there is no such recipe.
            Conflict: the queue is full, or the key was used with a different request.
        """
        return self.send(_start(request, idempotency_key))

    def compare(self, request: ComparisonRequest, *, idempotency_key: str | None = None) -> RunBody:
        """Start a run that compares training runs; its folder gets the report, and they get the verdict.

        Raises:
            NotFound: one of the runs does not exist.
            Conflict: the queue is full, or the key was used with a different request.
        """
        return self.send(_compare(request, idempotency_key))

    def runs(self) -> list[RunBody]:
        """Return all runs, newest first."""
        return self.send(_LIST).runs

    def get(self, run_id: str) -> RunBody:
        """Return one run.

        Raises:
            NotFound: there is no such run.
        """
        return self.send(_get(run_id))

    def metrics(self, run_id: str, *, since: str = "0") -> MetricsBody:
        """Return metrics from `since` on, which is `next` of an earlier response or a number of lines to skip."""
        return self.send(_metrics(run_id, since))

    def stop(self, run_id: str) -> RunBody:
        """Request that the run save a checkpoint and stop; its state changes once it has stopped.

        Raises:
            Conflict: the run is neither training nor queued.
        """
        return self.send(_command(run_id, "stop"))

    def pause(self, run_id: str) -> RunBody:
        """Request that the run save a checkpoint before its next step and pause.

        Raises:
            Conflict: the run is not training.
        """
        return self.send(_command(run_id, "pause"))

    def checkpoint(self, run_id: str) -> RunBody:
        """Request that the run save a checkpoint before its next step.

        Raises:
            Conflict: the run is not training.
        """
        return self.send(_command(run_id, "checkpoint"))

    def resume(self, run_id: str) -> RunBody:
        """Unpause the run, or continue a stopped or failed run from its last checkpoint.

        Raises:
            Conflict: there is nothing to continue.
        """
        return self.send(_command(run_id, "resume"))

    def follow(self, run_id: str, *, poll_s: float = _FOLLOW_POLL_S) -> Iterator[RunBody]:
        """Yield the run now and every `poll_s` seconds until its final state has been yielded."""
        while True:
            run = self.get(run_id)
            yield run
            if run.state in FINAL_STATES:
                return
            time.sleep(poll_s)


class AsyncRunClient(AsyncApiClient):
    """Asynchronous version of `RunClient`."""

    async def recipes(self) -> list[str]:
        """Return the names of the available recipes."""
        return (await self.send(_RECIPES)).recipes

    async def start(self, request: RunRequest, *, idempotency_key: str | None = None) -> RunBody:
        """See `RunClient.start`."""
        return await self.send(_start(request, idempotency_key))

    async def compare(self, request: ComparisonRequest, *, idempotency_key: str | None = None) -> RunBody:
        """See `RunClient.compare`."""
        return await self.send(_compare(request, idempotency_key))

    async def runs(self) -> list[RunBody]:
        """Return all runs, newest first."""
        return (await self.send(_LIST)).runs

    async def get(self, run_id: str) -> RunBody:
        """See `RunClient.get`."""
        return await self.send(_get(run_id))

    async def metrics(self, run_id: str, *, since: str = "0") -> MetricsBody:
        """See `RunClient.metrics`."""
        return await self.send(_metrics(run_id, since))

    async def stop(self, run_id: str) -> RunBody:
        """See `RunClient.stop`."""
        return await self.send(_command(run_id, "stop"))

    async def pause(self, run_id: str) -> RunBody:
        """See `RunClient.pause`."""
        return await self.send(_command(run_id, "pause"))

    async def checkpoint(self, run_id: str) -> RunBody:
        """See `RunClient.checkpoint`."""
        return await self.send(_command(run_id, "checkpoint"))

    async def resume(self, run_id: str) -> RunBody:
        """See `RunClient.resume`."""
        return await self.send(_command(run_id, "resume"))

    async def follow(self, run_id: str, *, poll_s: float = _FOLLOW_POLL_S) -> AsyncIterator[RunBody]:
        """Yield the run now and every `poll_s` seconds until its final state has been yielded."""
        while True:
            run = await self.get(run_id)
            yield run
            if run.state in FINAL_STATES:
                return
            await asyncio.sleep(poll_s)


_RECIPES = Call("GET", "/v1/recipes", json_of(RecipesBody))
_LIST = Call("GET", "/v1/runs", json_of(RunsBody))


def _start(request: RunRequest, idempotency_key: str | None) -> Call[RunBody]:
    return _post("/v1/runs", request, idempotency_key)


def _compare(request: ComparisonRequest, idempotency_key: str | None) -> Call[RunBody]:
    return _post("/v1/comparisons", request, idempotency_key)


def _post(path: str, request: RunRequest | ComparisonRequest, idempotency_key: str | None) -> Call[RunBody]:
    return Call(
        "POST",
        path,
        json_of(RunBody),
        body=request.model_dump(exclude_none=True),
        headers={} if idempotency_key is None else {"Idempotency-Key": idempotency_key},
    )


def _get(run_id: str) -> Call[RunBody]:
    return Call("GET", f"/v1/runs/{run_id}", json_of(RunBody))


def _metrics(run_id: str, since: str) -> Call[MetricsBody]:
    return Call("GET", f"/v1/runs/{run_id}/metrics", json_of(MetricsBody), query={"since": since})


def _command(run_id: str, command: str) -> Call[RunBody]:
    return Call("POST", f"/v1/runs/{run_id}/{command}", json_of(RunBody))
