"""Conversion between the project's errors and HTTP problem details, in both directions.

An error is sent as problem details (RFC 9457, `application/problem+json`). The `type` of the project's errors is a URN
with the name of the class, so that a client raises the same class as the service; errors of HTTP itself (no such path,
a body that is too large) have the type `about:blank`, as the RFC requires, and are identified by their status.
"""

from __future__ import annotations

from http import HTTPStatus

from pydantic import BaseModel, ConfigDict

from hyperagent.errors import (
    Busy,
    ConfigError,
    Conflict,
    CorruptRecord,
    HyperagentError,
    IdentityMismatch,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    NotServing,
    ServiceError,
    StorageError,
)

MEDIA_TYPE = "application/problem+json"

_MAX_DETAIL_CHARACTERS = 1000


class Problem(BaseModel):
    """Problem details (RFC 9457)."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    type: str = "about:blank"
    """URN of the kind of problem."""
    title: str
    """Short description of the kind of problem."""
    status: int
    """HTTP status code."""
    detail: str
    """What happened, why, and how to fix it, in one line."""
    instance: str
    """Path of the request."""


_SERVICE_ERROR = "urn:hyperagent:problem:service-error"

# The first matching class is used, so a class precedes its base class.
_KINDS: tuple[tuple[type[HyperagentError], HTTPStatus, str, str], ...] = (
    (Busy, HTTPStatus.TOO_MANY_REQUESTS, "urn:hyperagent:problem:busy", "Busy"),
    (NotServing, HTTPStatus.SERVICE_UNAVAILABLE, "urn:hyperagent:problem:not-serving", "Not serving"),
    (NotFound, HTTPStatus.NOT_FOUND, "urn:hyperagent:problem:not-found", "Not found"),
    (IdentityMismatch, HTTPStatus.CONFLICT, "urn:hyperagent:problem:identity-mismatch", "Identity mismatch"),
    (Conflict, HTTPStatus.CONFLICT, "urn:hyperagent:problem:conflict", "Conflict"),
    (LimitExceeded, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "urn:hyperagent:problem:limit-exceeded", "Limit exceeded"),
    (InvalidRequest, HTTPStatus.UNPROCESSABLE_ENTITY, "urn:hyperagent:problem:invalid-request", "Invalid request"),
    (ConfigError, HTTPStatus.UNPROCESSABLE_ENTITY, "urn:hyperagent:problem:config-error", "Wrong configuration"),
    (StorageError, HTTPStatus.INSUFFICIENT_STORAGE, "urn:hyperagent:problem:storage-error", "Storage refused"),
    (CorruptRecord, HTTPStatus.INTERNAL_SERVER_ERROR, "urn:hyperagent:problem:corrupt-record", "Corrupt record"),
    (HyperagentError, HTTPStatus.INTERNAL_SERVER_ERROR, _SERVICE_ERROR, "Service error"),
)

_ERROR_OF_TYPE: dict[str, type[HyperagentError]] = {
    **{type_uri: kind for kind, _, type_uri, _ in _KINDS},
    _SERVICE_ERROR: ServiceError,
}


def problem_of(error: HyperagentError, *, instance: str) -> Problem:
    """Return the problem details that describe `error` to a caller."""
    status, type_uri, title = next(row[1:] for row in _KINDS if isinstance(error, row[0]))
    return Problem(type=type_uri, title=title, status=status, detail=one_line(str(error)), instance=instance)


def http_problem(status: int, detail: str, *, instance: str) -> Problem:
    """Return the problem details of an HTTP error that has no class among the project's errors."""
    return Problem(title=HTTPStatus(status).phrase, status=status, detail=one_line(detail), instance=instance)


def error_of(problem: Problem) -> HyperagentError:
    """Return the error that a service's response represents."""
    kind = _ERROR_OF_TYPE.get(problem.type)
    if kind is None:
        kind = _error_of_status(problem.status)
    return kind(one_line(problem.detail))


def one_line(text: str) -> str:
    """Return `text` without line breaks, truncated to a readable length."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_DETAIL_CHARACTERS else line[: _MAX_DETAIL_CHARACTERS - 1] + "…"


def _error_of_status(status: int) -> type[HyperagentError]:
    if status == HTTPStatus.NOT_FOUND:
        return NotFound
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return LimitExceeded
    return InvalidRequest if 400 <= status < 500 else ServiceError
