"""The trainer's client: start training runs, watch and steer them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

from hyperagent.http.client import ApiClient, AsyncApiClient, Call, json_of
from hyperagent.http.run_models import FINAL_STATES, MetricsBody, RecipesBody, RunBody, RunRequest, RunsBody

_FOLLOW_POLL_S = 0.5


class RunClient(ApiClient):
    """A connection to one trainer; raises what `ApiClient` does."""

    def recipes(self) -> list[str]:
        """Return the names of the recipes that can be run."""
        return self.send(_RECIPES).recipes

    def start(self, request: RunRequest, *, idempotency_key: str | None = None) -> RunBody:
        """Start a run, or queue it behind the one that trains; the same key with the same request starts one run only.

        Raises:
            NotFound: there is no such recipe.
            Conflict: too many runs wait, or the key came with another request before.
        """
        return self.send(_start(request, idempotency_key))

    def runs(self) -> list[RunBody]:
        """Return every run, the newest first."""
        return self.send(_LIST).runs

    def get(self, run_id: str) -> RunBody:
        """Return one run.

        Raises:
            NotFound: there is no such run.
        """
        return self.send(_get(run_id))

    def metrics(self, run_id: str, *, since: str = "0") -> MetricsBody:
        """Return the run's metrics from `since` on: the `next` of an earlier answer, or a number of lines to leave out."""
        return self.send(_metrics(run_id, since))

    def stop(self, run_id: str) -> RunBody:
        """Have the run save a checkpoint and end; its state says when it has.

        Raises:
            Conflict: it neither trains nor waits.
        """
        return self.send(_command(run_id, "stop"))

    def pause(self, run_id: str) -> RunBody:
        """Have the run save a checkpoint before its next step and wait.

        Raises:
            Conflict: it does not train.
        """
        return self.send(_command(run_id, "pause"))

    def checkpoint(self, run_id: str) -> RunBody:
        """Have the run save a checkpoint before its next step.

        Raises:
            Conflict: it does not train.
        """
        return self.send(_command(run_id, "checkpoint"))

    def resume(self, run_id: str) -> RunBody:
        """End the run's pause, or continue a stopped or failed run from its last checkpoint.

        Raises:
            Conflict: there is nothing to continue.
        """
        return self.send(_command(run_id, "resume"))

    def follow(self, run_id: str, *, poll_s: float = _FOLLOW_POLL_S) -> Iterator[RunBody]:
        """Yield the run now and every `poll_s` seconds, last of all in its final state."""
        while True:
            run = self.get(run_id)
            yield run
            if run.state in FINAL_STATES:
                return
            time.sleep(poll_s)


class AsyncRunClient(AsyncApiClient):
    """`RunClient` for an event loop."""

    async def recipes(self) -> list[str]:
        """Return the names of the recipes that can be run."""
        return (await self.send(_RECIPES)).recipes

    async def start(self, request: RunRequest, *, idempotency_key: str | None = None) -> RunBody:
        """See `RunClient.start`."""
        return await self.send(_start(request, idempotency_key))

    async def runs(self) -> list[RunBody]:
        """Return every run, the newest first."""
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
        """Yield the run now and every `poll_s` seconds, last of all in its final state."""
        while True:
            run = await self.get(run_id)
            yield run
            if run.state in FINAL_STATES:
                return
            await asyncio.sleep(poll_s)


_RECIPES = Call("GET", "/v1/recipes", json_of(RecipesBody))
_LIST = Call("GET", "/v1/runs", json_of(RunsBody))


def _start(request: RunRequest, idempotency_key: str | None) -> Call[RunBody]:
    return Call(
        "POST",
        "/v1/runs",
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
