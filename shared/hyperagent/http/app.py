"""Construction of a REST application with everything except its routes.

Errors are returned as problem details, every path except the public ones requires the bearer token, body size is
limited, and requests are measured. There is no page at /docs, because a browser could not send the token and the page
would load scripts from other sites. The schema is at /openapi.json.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Match

from hyperagent.errors import Busy, HyperagentError, InvalidRequest, NotServing
from hyperagent.http.middleware import LimitBody, MeasureRequests, RequireToken, instance_of, problem_response
from hyperagent.http.problems import MEDIA_TYPE, Problem, http_problem, problem_of

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_MAX_NAMED_FIELDS = 5
_MAX_FIELD_CHARACTERS = 60
_MAX_REASON_CHARACTERS = 120

_log = structlog.get_logger()


def create_app(
    *,
    title: str,
    version: str,
    token: str,
    public_paths: Collection[str] = (),
    max_body_bytes: int = 1 << 20,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """Create an application to which routes are added; routes raise the project's errors and never handle them.

    Args:
        token: token that callers must send as `Authorization: Bearer`.
        public_paths: paths served without the token in addition to the health checks; only static files, never data.
        max_body_bytes: maximum size of a request body.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    schema = {"content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}}
    app = FastAPI(
        title=title,
        version=version,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": {"description": "Problem details (RFC 9457)", **schema}},
        middleware=[
            Middleware(MeasureRequests, registry=registry),
            Middleware(RequireToken, token=token, public_paths=public_paths),
            Middleware(LimitBody, max_body_bytes=max_body_bytes),
        ],
        exception_handlers={
            HyperagentError: _answer_error,
            RequestValidationError: _answer_validation_error,
            HTTPException: _answer_http_error,
            Exception: _answer_defect,
        },
    )
    # Connections are accepted only after startup has finished, so any response means that the service is ready.
    app.get("/healthz")(_healthy)
    app.get("/readyz")(_healthy)

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Return metrics in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _healthy() -> dict[str, str]:
    """Report that the service is running."""
    return {"status": "ok"}


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HyperagentError)
    problem = problem_of(error, instance=instance_of(request.scope))
    if problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("request failed", method=request.method, path=problem.instance, error=problem.detail)
    return problem_response(problem, headers=_retry_after(error))


def _retry_after(error: HyperagentError) -> dict[str, str] | None:
    if isinstance(error, Busy):
        return {"Retry-After": str(error.retry_after_s)}
    return {"Retry-After": "1"} if isinstance(error, NotServing) else None


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    refusal = InvalidRequest(f"the request is invalid: {_describe(error.errors())}; correct it and send it again")
    return problem_response(problem_of(refusal, instance=instance_of(request.scope)))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = instance_of(request.scope)
    detail, headers = error.detail, dict(error.headers or {})
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = f"there is nothing at {path}; see /openapi.json for the available paths"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{path} does not support {request.method[:20]}; see /openapi.json for the supported methods"
        headers["Allow"] = ", ".join(_methods_of(request))
    problem = http_problem(error.status_code, detail, instance=path)
    return problem_response(problem, headers=headers)


def _methods_of(request: Request) -> list[str]:
    """Return all methods of the path (RFC 9110, section 15.5.6); Starlette reports only the first route's."""
    routes = request.app.router.routes
    return [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]


async def _answer_defect(request: Request, _error: Exception) -> Response:
    # The server logs the traceback; the caller must not see it.
    problem = http_problem(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "an internal error occurred; see the service's log",
        instance=instance_of(request.scope),
    )
    return problem_response(problem)


def _describe(errors: Sequence[Mapping[str, Any]]) -> str:
    """Describe the first invalid fields without their values; truncate names, which callers can make very long."""
    described = [
        f"{'.'.join(map(str, error['loc']))[:_MAX_FIELD_CHARACTERS]}: {error['msg'][:_MAX_REASON_CHARACTERS]}"
        for error in errors[:_MAX_NAMED_FIELDS]
    ]
    if len(errors) > _MAX_NAMED_FIELDS:
        described.append(f"and {len(errors) - _MAX_NAMED_FIELDS} more")
    return "; ".join(described)
