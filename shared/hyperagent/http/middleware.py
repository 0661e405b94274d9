"""Middleware that runs before the routes, in plain ASGI so that bodies are not buffered."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Collection
from http import HTTPStatus
from urllib.parse import quote

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyperagent.auth import is_authorized
from hyperagent.http.problems import MEDIA_TYPE, Problem, http_problem

OPEN_PATHS = ("/healthz", "/readyz")
"""Paths served without a token, for containers' health checks."""

BODY_TIMEOUT_S = 10.0
"""Seconds in which the body of a request must arrive."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_MAX_INSTANCE_CHARACTERS = 200


def instance_of(scope: Scope) -> str:
    """Return the request's path as a problem's `instance`, truncated to a readable length."""
    return quote(scope["path"])[:_MAX_INSTANCE_CHARACTERS]


def problem_response(problem: Problem, *, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the HTTP response for `problem`."""
    return JSONResponse(problem.model_dump(), status_code=problem.status, headers=headers, media_type=MEDIA_TYPE)


class MeasureRequests:
    """Count and time requests by route template, because full paths would create a time series per adapter."""

    def __init__(self, app: ASGIApp, *, registry: CollectorRegistry) -> None:
        self._app = app
        self._requests = Counter(
            "hyperagent_http_requests", "Requests answered.", ("method", "route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "hyperagent_http_request_seconds",
            "Time to the last byte of the answer, in seconds.",
            ("method", "route"),
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = HTTPStatus.INTERNAL_SERVER_ERROR.value

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        try:
            await self._app(scope, receive, send_and_note)
        finally:
            # The router adds the matched route to the scope.
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._requests.labels(method, route, status).inc()
            self._seconds.labels(method, route).observe(time.perf_counter() - started)


class RequireToken:
    """Refuse requests without the bearer token (RFC 6750)."""

    def __init__(self, app: ASGIApp, *, token: str, public_paths: Collection[str]) -> None:
        """Guard `app`.

        Args:
            public_paths: paths served without the token, like the health checks.
        """
        self._app = app
        self._token = token
        self._public_paths = {*OPEN_PATHS, *public_paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._public_paths:
            return await self._app(scope, receive, send)
        header = Headers(scope=scope).get("authorization")
        if is_authorized(header, self._token):
            return await self._app(scope, receive, send)
        problem = http_problem(
            HTTPStatus.UNAUTHORIZED,
            "the request lacks this service's access token; send Authorization: Bearer TOKEN",
            instance=instance_of(scope),
        )
        challenge = 'Bearer realm="hyperagent"' + ("" if header is None else ', error="invalid_token"')
        return await problem_response(problem, headers={"WWW-Authenticate": challenge})(scope, receive, send)


class LimitBody:
    """Refuse a body above the limit, at once if its length is declared, and one that takes too long to arrive."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        detail = (
            f"the request's body is larger than {self._max_body_bytes} bytes, the maximum for this service; shorten it"
        )
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            problem = http_problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, instance=instance_of(scope))
            return await problem_response(problem)(scope, receive, send)
        received_bytes = 0
        is_complete = False
        deadline = time.monotonic() + BODY_TIMEOUT_S

        async def receive_and_count() -> Message:
            nonlocal received_bytes, is_complete
            if is_complete:  # From now on, `receive` only waits for the client to leave.
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                slow = f"the request's body did not arrive within {BODY_TIMEOUT_S:g} s; send it faster"
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, slow) from None
            is_complete = not message.get("more_body", False)
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._max_body_bytes:
                # HTTPException is the only kind that FastAPI's body parsing passes on unchanged.
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
            return message

        return await self._app(scope, receive_and_count, send)


class RequireHost:
    """Refuse requests for host names that are not the service's own.

    A web page can resolve its own host name to 127.0.0.1 (DNS rebinding) and thereby reach a loopback service from the
    browser that shows it. Its requests still have that name in Host; an IP address there cannot have been rebound.
    """

    def __init__(self, app: ASGIApp, *, any_address: bool, names: Collection[str]) -> None:
        """Guard `app`.

        Args:
            any_address: accept every IP address, not only loopback addresses.
            names: host names accepted in addition to `localhost`.
        """
        self._app = app
        self._any_address = any_address
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        host = Headers(scope=scope).get("host", "")
        if self._is_own(host):
            return await self._app(scope, receive, send)
        problem = http_problem(
            HTTPStatus.MISDIRECTED_REQUEST,
            f"this service is not reachable under the name {host[:100]!r}; use localhost or its IP address, "
            "or add the name to its allowed hosts",
            instance=instance_of(scope),
        )
        return await problem_response(problem)(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name.lower().rstrip(".") in self._names
        return self._any_address or address.is_loopback
